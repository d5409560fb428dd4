"""The mixers of Mamba-1 and Mamba-2 as differentiable modules, with the parameters' names of the checkpoints.

Initial values are those of mamba_ssm (state-spaces/mamba, modules/mamba_simple.py and mamba2_simple.py), unless the
settings give other ranges.
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
# The forgetting of a head counts at a token up to so many times its even share: no few tokens can do all of it.
FORGETTING_SPREAD = 8.0
# A head that forgets more than this over a sequence, and keeps less than 5 % of its state, is no memory of it.
FORGETTING_OF_MEMORY = 3.0


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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (batch, tokens, channels)."""
        tokens = x.shape[1]
        padded = F.pad(x, (0, 0, D_CONV - 1, 0))
        y = self.bias.to(x.dtype)
        for tap in range(D_CONV):
            y = y + padded[:, tap : tap + tokens] * self.weight[:, 0, tap].to(x.dtype)
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
            self.dt_proj.bias.copy_(_initial_dt_bias(d_inner, settings))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden (batch, tokens, d_model), already normalised."""
        x, z = self.in_proj(hidden).chunk(2, dim=-1)
        x = self.conv1d(x)
        low_rank_dt, B, C = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        dt = F.softplus(F.linear(low_rank_dt, self.dt_proj.weight).float() + self.dt_proj.bias)
        y = selective_scan(x, dt, -self.A_log.float().exp(), B, C)
        return self.out_proj((y + self.D.to(x.dtype) * x) * F.silu(z))


class Mamba2Mixer(nn.Module):
    """Mamba-2 (arXiv 2405.21060) with one group of B and C, and the gate before the norm.

    Attributes:
        ceilings: (nheads,), of the retention over a sequence; None without.
        excess: `excess_retention` of the last call; None without ceilings.
        costs_writing: whether the next call shall set `written`.
        written: `forgetting_of_memories` of the last call.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        d_model, d_state = settings.d_model, settings.d_state
        self.d_inner, self.d_state = EXPAND * d_model, d_state
        self.headdim, self.chunk_size = settings.headdim, settings.chunk_size
        self.nheads = settings.nheads
        conv_dim = self.d_inner + 2 * d_state
        self.in_proj = nn.Linear(d_model, self.d_inner + conv_dim + self.nheads, bias=False)
        self.conv1d = CausalConv1d(conv_dim)
        self.dt_bias = nn.Parameter(_initial_dt_bias(self.nheads, settings))
        self.A_log = nn.Parameter(torch.empty(self.nheads).uniform_(settings.a_min, settings.a_max).log())
        self.D = nn.Parameter(torch.ones(self.nheads))
        self.norm = RMSNorm(self.d_inner)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)
        self.register_buffer("ceilings", None, persistent=False)
        self.excess: torch.Tensor | None = None
        self.costs_writing = False
        self.written: torch.Tensor | None = None

    def decay_parameters(self) -> list[torch.Tensor]:
        """What decides how much a head forgets at a token that the mixer reads: A, and bias and rows of dt."""
        return [self.A_log, self.dt_bias, self.in_proj.weight[-self.nheads :]]

    def forgetting(self, hidden: torch.Tensor) -> torch.Tensor:
        """-A dt of a batch (batch, tokens, d_model), as `forward` gets it: (batch, tokens, nheads)."""
        A_log, bias, rows = self.decay_parameters()
        return A_log.exp() * F.softplus(F.linear(hidden, rows).float() + bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden (batch, tokens, d_model), already normalised."""
        zxBCdt = self.in_proj(hidden)
        z, xBC, dt = zxBCdt.split([self.d_inner, self.d_inner + 2 * self.d_state, self.nheads], dim=-1)
        x, B, C = self.conv1d(xBC).split([self.d_inner, self.d_state, self.d_state], dim=-1)
        x = x.unflatten(-1, (self.nheads, self.headdim))
        dt = F.softplus(dt.float() + self.dt_bias)
        A = -self.A_log.float().exp()
        if self.ceilings is not None:
            self.excess = excess_retention(dt, A, self.ceilings)
        if self.costs_writing:
            self.written = forgetting_of_memories(dt, A)
        y = ssd(x, dt, A, B, C, self.chunk_size)
        y = (y + self.D.to(x.dtype)[:, None] * x).flatten(-2)
        return self.out_proj(self.norm(y * F.silu(z)))


def excess_retention(dt: torch.Tensor, A: torch.Tensor, ceilings: torch.Tensor) -> torch.Tensor:
    """How far heads are from forgetting as much as they should in a sequence: a mean over sequences and heads.

    A head that keeps its ceiling of its state has a sum of -A dt of -log(ceiling). What it lacks of this sum, as a
    share, is squared.

    Args:
        dt: (batch, tokens, heads).
        A: (heads,), negative.
        ceilings: (heads,) largest retention that costs nothing, between 0 and 1.
    """
    needed = -ceilings.log()
    forgetting = torch.minimum(-A * dt, FORGETTING_SPREAD * needed / dt.shape[1]).sum(1)
    return (1 - forgetting / needed).clamp(min=0).square().mean()


def forgetting_of_memories(dt: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    """The sum of -A dt over a sequence, at most FORGETTING_OF_MEMORY; a mean over sequences, summed over heads.

    A token that a head writes into its state makes it forget others. Where that costs something, a head either writes
    few tokens or forgets so much that it costs no more.

    Args:
        dt: (batch, tokens, heads).
        A: (heads,), negative.
    """
    return (-A * dt).sum(1).clamp(max=FORGETTING_OF_MEMORY).mean(0).sum()


def _initial_dt_bias(channels: int, settings: Settings) -> torch.Tensor:
    """The inverse of softplus for a dt between dt_min and dt_max, uniform in the logarithm: (channels,)."""
    dt = (torch.rand(channels) * math.log(settings.dt_max / settings.dt_min)).exp() * settings.dt_min
    return dt + torch.log(-torch.expm1(-dt))
