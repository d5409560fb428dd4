"""Triton kernel of :mod:`kernels.gated_norm`; imported by the wrapper only where Triton can run."""

# mypy: ignore-errors
# Triton's language looks like Python but does not have its types.

import triton
import triton.language as tl

from .dispatch import supports_dependent_launch
from .launch import launch
from .launch_sizes import next_power_of_2
from .triton_helpers import silu

# Channels that a warp has, and the most warps of a program.
WARP_CHANNELS = 512
MOST_WARPS = 16


@triton.jit
def _gated_norm_kernel(
    x_ptr, gate_ptr, weight_ptr, out_ptr, x_stride, gate_stride, out_stride, eps,
    channels: tl.constexpr, BLOCK: tl.constexpr, launch_pdl: tl.constexpr,
):  # fmt: skip
    """One token.

    launch_pdl: the kernel may start before the one in front of it ends (programmatic dependent launch). Until it waits
    it reads only its weight.
    """
    channel = tl.arange(0, BLOCK)
    is_channel = channel < channels
    weight = tl.load(weight_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)
    if launch_pdl:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    # rows in int64: rows x stride passes 2^31
    row = tl.program_id(0).to(tl.int64)
    gate = tl.load(gate_ptr + row * gate_stride + channel, mask=is_channel, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row * x_stride + channel, mask=is_channel, other=0.0).to(tl.float32) * silu(gate)
    factor = tl.rsqrt(tl.sum(x * x, 0) / channels + eps)
    tl.store(out_ptr + row * out_stride + channel, (x * factor * weight).to(out_ptr.dtype.element_ty), mask=is_channel)


def gated_norm_triton(x, gate, weight, eps, out) -> None:
    """Launch for checked arguments; see :func:`kernels.gated_norm.gated_norm`."""
    tokens, channels = x.shape
    block = next_power_of_2(channels)
    warps = min(max(block // WARP_CHANNELS, 1), MOST_WARPS)
    launch(_gated_norm_kernel, (tokens,), x)(
        x, gate, weight, out, x.stride(0), gate.stride(0), out.stride(0), eps,
        channels=channels, BLOCK=block, num_warps=warps, launch_pdl=supports_dependent_launch(x.device),
    )  # fmt: skip
