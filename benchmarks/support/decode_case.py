"""The arguments of a layer's decode kernels, as vLLM's cache and the mixers lay them out."""

from typing import Any, NamedTuple

import torch

from vllm_longmamba.kernels import causal_conv1d_update_triton as conv_module
from vllm_longmamba.kernels import selective_state_update_triton as update_module

from .h200 import BYTES_PER_US

# several times the largest batch, and far more than the GPU keeps to itself
CACHE_BYTES = 2e9
MOST_CALLS = 400


class Shape(NamedTuple):
    """Of a Mamba layer; headdim 0: Mamba-1."""

    d_inner: int
    d_state: int
    headdim: int = 0
    ngroups: int = 1


SHAPES = {
    "mamba2-1.3b": Shape(4096, 128, 64),
    "mamba-1.4b": Shape(4096, 16),
    "zamba2-1.2b": Shape(4096, 64, 64),
    "falcon-mamba-7b": Shape(8192, 16),
    "nemotron-h-8b": Shape(8192, 128, 64, 8),
}


class Case:
    """The arguments of a layer's decode kernels for one batch, in the layout that the mixers hand them over.

    Attributes:
        slots: (calls, batch): the slots of each call.
    """

    def __init__(self, shape: Shape, batch: int) -> None:
        self.shape, self.batch = shape, batch
        d_inner, d_state, headdim, ngroups = shape
        self.nheads = d_inner // headdim if headdim else 1
        self.per_token = self.nheads if headdim else d_inner
        self.conv_channels = d_inner + 2 * ngroups * d_state if headdim else d_inner
        bf16 = {"dtype": torch.bfloat16, "device": "cuda"}
        conv_bytes = 6 * self.conv_channels
        page = conv_bytes + d_inner * d_state * torch.bfloat16.itemsize
        pages = max(batch, int(CACHE_BYTES / page) // batch * batch)
        cache = torch.zeros(pages + 1, page, dtype=torch.uint8, device="cuda")
        self.conv_state = cache[:, :conv_bytes].view(torch.bfloat16).unflatten(1, (3, -1)).transpose(1, 2)
        self.state = cache[:, conv_bytes:].view(torch.bfloat16).unflatten(1, (d_inner, d_state))
        order = torch.randperm(pages, device="cuda", dtype=torch.int32) + 1
        self.slots = order.view(-1, batch)[:MOST_CALLS].contiguous()
        # Mamba-1's dt comes out of a projection of its own
        sizes = [d_inner, self.conv_channels, *([self.per_token] if headdim else [])]
        self.projected = torch.randn(batch, sum(sizes), **bf16)
        self.z, self.x, *dt = self.projected.split(sizes, 1)
        self.dt = dt[0] if headdim else torch.randn(batch, d_inner, **bf16)
        self.convolved = torch.randn(batch, self.conv_channels, **bf16)
        self.low_rank = torch.randn(batch, d_inner // 32 + 2 * d_state, **bf16)
        wide = self.convolved if headdim else self.low_rank
        self.B, self.C = wide[:, -2 * ngroups * d_state :].chunk(2, 1)
        self.A = -torch.rand(self.per_token, *([] if headdim else [d_state]), device="cuda")
        self.D, self.dt_bias = torch.ones(2, self.per_token, device="cuda")
        self.weight, self.bias = torch.randn(self.conv_channels, 4, **bf16), torch.randn(self.conv_channels, **bf16)
        self.rank = 0 if headdim else d_inner // 32
        self.low_rank_dt = self.low_rank[:, : self.rank]
        self.dt_weight = torch.randn(d_inner, self.rank, **bf16)
        self.dt_threshold = torch.full((8, self.per_token), -1.0, device="cuda")
        self.token_rows = torch.zeros(batch, dtype=torch.int32, device="cuda")
        self.out = torch.empty(batch, d_inner, **bf16)

    def update_arguments(self, call: int) -> dict[str, Any]:
        return {
            "state": self.state, "x": self.convolved[:, : self.shape.d_inner], "dt": self.dt, "A": self.A, "B": self.B,
            "C": self.C, "D": self.D, "z": None if self.shape.headdim else self.z, "dt_bias": self.dt_bias,
            "state_indices": self.slots[call], "dt_threshold": self.dt_threshold, "token_rows": self.token_rows,
            "out": self.out,
        }  # fmt: skip

    def conv_arguments(self, call: int) -> dict[str, Any]:
        return {
            "x": self.x, "weight": self.weight, "bias": self.bias, "conv_state": self.conv_state,
            "state_indices": self.slots[call], "silu": True, "out": self.convolved,
        }  # fmt: skip

    def update(self, call: int) -> None:
        update_module.selective_state_update_triton(**self.update_arguments(call))

    def conv(self, call: int) -> None:
        conv_module.causal_conv1d_update_triton(**self.conv_arguments(call))

    def update_with_projection(self, call: int) -> None:
        given = self.update_arguments(call) | {"dt": self.low_rank_dt, "dt_weight": self.dt_weight}
        update_module.selective_state_update_triton(**given)

    def floor(self) -> float:
        """Microseconds that the states' bytes take, read and written."""
        return 2 * self.batch * self.state[0].numel() * self.state.element_size() / BYTES_PER_US

    def conv_floor(self) -> float:
        return 2 * 2 * (3 + 1) * self.batch * self.conv_channels / BYTES_PER_US
