"""Mamba-1 and Mamba-2 mixers in two steps, between which a method acts: projections, then the recurrence."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn import functional

from vllm_longmamba.kernels import selective_scan

from .layers import causal_conv1d, gated_rms_norm, inverse_softplus, rms_norm, softplus
from .ssd import ssd

# Tokens of a chunk of Mamba-2's recurrence. A CPU's work grows with it (32 and 64 were the fastest of 16 to 128); a GPU
# launches fewer kernels for it.
CHUNK_SIZE = {"cpu": 32, "cuda": 128}


@dataclass(frozen=True)
class Projection:
    """What the recurrence of some tokens takes; (batch, tokens, ...) float32 each.

    Attributes:
        x: (..., d_inner), after the convolution.
        z: (..., d_inner), the gate.
        dt: (..., channels), after softplus. A channel is one of d_inner in Mamba-1, a head in Mamba-2.
        B, C: (..., d_state) in Mamba-1, (..., ngroups, d_state) in Mamba-2.
        raw_dt: (..., channels), before softplus, with its bias.
    """

    x: torch.Tensor
    z: torch.Tensor
    dt: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    raw_dt: torch.Tensor

    def take(self, tokens: torch.Tensor) -> "Projection":
        """Some of the tokens: (kept,) int64 indices."""
        fields = (self.x, self.z, self.dt, self.B, self.C, self.raw_dt)
        return Projection(*(field.index_select(1, tokens) for field in fields))

    def with_dt(self, dt: torch.Tensor) -> "Projection":
        """With another dt, (batch, tokens, channels), >= 0."""
        # Where dt stays, so does the very number before softplus.
        raw_dt = torch.where(dt == self.dt, self.raw_dt, inverse_softplus(dt))
        return Projection(self.x, self.z, dt, self.B, self.C, raw_dt)


@dataclass
class MixerState:
    """What a mixer remembers of the tokens it has run.

    Attributes:
        history: (batch, d_conv - 1, conv channels), the last inputs of the convolution.
        ssm: the recurrence's state, in each mixer's own layout.
    """

    history: torch.Tensor
    ssm: torch.Tensor


class Mixer(Protocol):
    """Either mixer.

    Attributes:
        A: (channels, d_state) in Mamba-1, (channels,) in Mamba-2; negative.
    """

    A: torch.Tensor

    def empty_state(self, batch: int) -> MixerState:
        """The state before the first token."""

    def project(self, hidden: torch.Tensor, history: torch.Tensor) -> tuple[Projection, torch.Tensor]:
        """Everything up to dt, B and C.

        Args:
            hidden: (batch, tokens, d_model), already normalised.
            history: of the tokens before.

        Returns:
            The projection, and the history for the tokens that follow.
        """

    def scan(self, projection: Projection, state: MixerState) -> torch.Tensor:
        """The recurrence and all that follows; `state.ssm` moves on.

        Returns:
            (batch, tokens, d_model)
        """


def make_mixer(weights: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> Mixer:
    """The mixer of one layer.

    Args:
        weights: float32, under the names of a checkpoint without the layer's prefix.
        config: under transformers' names.
    """
    return Mamba1Mixer(weights, config) if "x_proj.weight" in weights else Mamba2Mixer(weights, config)


class Mamba1Mixer:
    """Mamba-1 (arXiv 2312.00752), also FalconMamba's with its norms on dt, B and C."""

    def __init__(self, weights: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> None:
        self.weights = weights
        self.rms_eps = config["mixer_rms_eps"] if config["model_type"] == "falcon_mamba" else None
        self.conv_weight = weights["conv1d.weight"].squeeze(1).contiguous()
        self.A = -weights["A_log"].exp()
        self.d_inner, self.d_state = self.A.shape
        self.dt_rank = weights["dt_proj.weight"].shape[1]

    def empty_state(self, batch: int) -> MixerState:
        history = self.A.new_zeros(batch, self.conv_weight.shape[1] - 1, self.d_inner)
        # Slot 0 means padding to the kernel.
        return MixerState(history, self.A.new_zeros(batch + 1, self.d_inner, self.d_state))

    def project(self, hidden: torch.Tensor, history: torch.Tensor) -> tuple[Projection, torch.Tensor]:
        weights = self.weights
        x, z = functional.linear(hidden, weights["in_proj.weight"], weights.get("in_proj.bias")).chunk(2, dim=-1)
        x, history = causal_conv1d(x, self.conv_weight, weights.get("conv1d.bias"), history)
        projected = functional.linear(x, weights["x_proj.weight"])
        low_rank_dt, B, C = torch.split(projected, [self.dt_rank, self.d_state, self.d_state], dim=-1)
        if self.rms_eps is not None:
            low_rank_dt, B, C = (rms_norm(tensor, None, self.rms_eps) for tensor in (low_rank_dt, B, C))
        raw_dt = functional.linear(low_rank_dt, weights["dt_proj.weight"], weights["dt_proj.bias"])
        return Projection(x, z, softplus(raw_dt), B, C, raw_dt), history

    def scan(self, projection: Projection, state: MixerState) -> torch.Tensor:
        batch, tokens, _ = projection.x.shape
        device = projection.x.device
        x, raw_dt, B, C, z = (
            tensor.flatten(0, 1)
            for tensor in (projection.x, projection.raw_dt, projection.B, projection.C, projection.z)
        )
        slots = torch.arange(1, batch + 1, dtype=torch.int32, device=device)
        y = selective_scan(
            x,
            raw_dt,
            self.A,
            B,
            C,
            self.weights["D"],
            z,
            torch.zeros_like(self.weights["D"]),
            state.ssm,
            torch.arange(batch + 1, dtype=torch.int32, device=device) * tokens,
            slots,
            torch.ones(batch, dtype=torch.bool, device=device),
        )
        y = torch.unflatten(y, 0, (batch, tokens))
        return functional.linear(y, self.weights["out_proj.weight"], self.weights.get("out_proj.bias"))


class Mamba2Mixer:
    """Mamba-2 (arXiv 2405.21060)."""

    def __init__(self, weights: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> None:
        self.weights = weights
        self.eps = config["layer_norm_epsilon"]
        self.ngroups = config["n_groups"]
        self.conv_weight = weights["conv1d.weight"].squeeze(1).contiguous()
        self.A = -weights["A_log"].exp()
        self.nheads, self.d_inner = self.A.shape[0], weights["norm.weight"].shape[0]
        self.headdim = self.d_inner // self.nheads
        self.d_state = (self.conv_weight.shape[0] - self.d_inner) // (2 * self.ngroups)

    def empty_state(self, batch: int) -> MixerState:
        history = self.A.new_zeros(batch, self.conv_weight.shape[1] - 1, self.conv_weight.shape[0])
        return MixerState(history, self.A.new_zeros(batch, self.nheads, self.headdim, self.d_state))

    def project(self, hidden: torch.Tensor, history: torch.Tensor) -> tuple[Projection, torch.Tensor]:
        weights, groups = self.weights, self.ngroups * self.d_state
        projected = functional.linear(hidden, weights["in_proj.weight"], weights.get("in_proj.bias"))
        z, xBC, raw_dt = torch.split(projected, [self.d_inner, self.conv_weight.shape[0], self.nheads], dim=-1)
        xBC, history = causal_conv1d(xBC, self.conv_weight, weights.get("conv1d.bias"), history)
        x, B, C = torch.split(xBC, [self.d_inner, groups, groups], dim=-1)
        B, C = (torch.unflatten(tensor, -1, (self.ngroups, self.d_state)) for tensor in (B, C))
        raw_dt = raw_dt + weights["dt_bias"]
        return Projection(x, z, softplus(raw_dt), B, C, raw_dt), history

    def scan(self, projection: Projection, state: MixerState) -> torch.Tensor:
        x = torch.unflatten(projection.x, -1, (self.nheads, self.headdim))
        chunk_size = CHUNK_SIZE[x.device.type]
        y, state.ssm = ssd(x, projection.dt, self.A, projection.B, projection.C, state.ssm, chunk_size)
        y = (y + self.weights["D"][:, None] * x).flatten(-2)
        y = gated_rms_norm(y, projection.z, self.weights["norm.weight"], self.eps, self.ngroups)
        return functional.linear(y, self.weights["out_proj.weight"], self.weights.get("out_proj.bias"))
