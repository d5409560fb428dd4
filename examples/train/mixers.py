"""The mixers of Mamba-1 and Mamba-2 as differentiable modules, with the parameters' names of the checkpoints.

Initial values are those of mamba_ssm (state-spaces/mamba, modules/mamba_simple.py and mamba2_simple.py). Of several
sequences in a row, `seq_idx` (tokens,) int32 says which one a token is of, in rising order; none sees another.
"""

import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from .selective_scan import selective_scan
from .settings import EXPAND, Settings
from .ssd import ssd

D_CONV = 4
NORM_EPS = 1e-5
# Of Mamba-2's initial decays -A, uniform. Mamba-1's are 1 to d_state.
A_RANGE = (1.0, 16.0)
# Of the initial time steps, softplus of their bias, uniform in the logarithm.
DT_RANGE = (1e-3, 1e-1)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in float32; the result has the dtype of x."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., size)."""
        normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + NORM_EPS)
        return (normed * self.weight).to(x.dtype)


class CausalConv1d(nn.Module):
    """Depthwise convolution in which a token sees itself and D_CONV - 1 before it, then silu.

    D_CONV shifted products: cudnn's depthwise convolution is slow in its gradients, and these fuse.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        bound = D_CONV**-0.5
        self.weight = nn.Parameter(torch.empty(channels, 1, D_CONV).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(channels).uniform_(-bound, bound))

    def forward(self, x: torch.Tensor, seq_idx: torch.Tensor) -> torch.Tensor:
        """x (batch, tokens, channels)."""
        tokens = x.shape[1]
        padded, padded_idx = F.pad(x, (0, 0, D_CONV - 1, 0)), F.pad(seq_idx, (D_CONV - 1, 0), value=-1)
        y = self.bias.to(x.dtype)
        for tap in range(D_CONV):
            is_seen = (padded_idx[tap : tap + tokens] == seq_idx)[:, None]
            y = y + padded[:, tap : tap + tokens] * is_seen * self.weight[:, 0, tap].to(x.dtype)
        return F.silu(y)


class Mamba1Mixer(nn.Module):
    """Mamba-1 (arXiv 2312.00752)."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        d_model, d_state = settings.d_model, settings.d_state
        d_inner, self.dt_rank, self.d_state = EXPAND * d_model, math.ceil(d_model / 16), d_state
        self.in_proj = nn.Linear(d_model, 2 * d_inner, bias=False)
        self.conv1d = CausalConv1d(d_inner)
        self.x_proj = nn.Linear(d_inner, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, d_inner)
        self.A_log = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(d_inner, 1))
        self.D = nn.Parameter(torch.ones(d_inner))
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        with torch.no_grad():
            self.dt_proj.bias.copy_(_initial_dt_bias(d_inner))

    def forward(self, hidden: torch.Tensor, seq_idx: torch.Tensor) -> torch.Tensor:
        """hidden (batch, tokens, d_model), already normalised."""
        x, z = self.in_proj(hidden).chunk(2, dim=-1)
        x = self.conv1d(x, seq_idx)
        low_rank_dt, B, C = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        dt = F.softplus(F.linear(low_rank_dt, self.dt_proj.weight).float() + self.dt_proj.bias)
        y = selective_scan(x, dt, -self.A_log.float().exp(), B, C, seq_idx)
        return self.out_proj((y + self.D.to(x.dtype) * x) * F.silu(z))


class Mamba2Mixer(nn.Module):
    """Mamba-2 (arXiv 2405.21060) with one group of B and C, and the gate before the norm."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        d_model, d_state = settings.d_model, settings.d_state
        self.d_inner, self.d_state = EXPAND * d_model, d_state
        self.headdim, self.nheads = settings.headdim, settings.nheads
        conv_dim = self.d_inner + 2 * d_state
        self.in_proj = nn.Linear(d_model, self.d_inner + conv_dim + self.nheads, bias=False)
        self.conv1d = CausalConv1d(conv_dim)
        self.dt_bias = nn.Parameter(_initial_dt_bias(self.nheads))
        self.A_log = nn.Parameter(torch.empty(self.nheads).uniform_(*A_RANGE).log())
        self.D = nn.Parameter(torch.ones(self.nheads))
        self.norm = RMSNorm(self.d_inner)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)

    def forward(self, hidden: torch.Tensor, seq_idx: torch.Tensor) -> torch.Tensor:
        """hidden (batch, tokens, d_model), already normalised."""
        zxBCdt = self.in_proj(hidden)
        z, xBC, dt = zxBCdt.split([self.d_inner, self.d_inner + 2 * self.d_state, self.nheads], dim=-1)
        x, B, C = self.conv1d(xBC, seq_idx).split([self.d_inner, self.d_state, self.d_state], dim=-1)
        x = x.unflatten(-1, (self.nheads, self.headdim))
        dt = F.softplus(dt.float() + self.dt_bias)
        y = ssd(x, dt, -self.A_log.float().exp(), B, C, seq_idx)
        y = (y + self.D.to(x.dtype)[:, None] * x).flatten(-2)
        return self.out_proj(self.norm(y * F.silu(z)))


def _initial_dt_bias(channels: int) -> torch.Tensor:
    """The inverse of softplus for a dt in DT_RANGE: (channels,)."""
    smallest, largest = DT_RANGE
    dt = (torch.rand(channels) * math.log(largest / smallest)).exp() * smallest
    return dt + torch.log(-torch.expm1(-dt))
