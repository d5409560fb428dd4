"""Triton kernel of :mod:`kernels.causal_conv1d_update`; imported by the wrapper only where Triton can run."""

# mypy: ignore-errors
# ruff: noqa: RUF005
# Triton's language looks like Python but has neither its types nor starred tuples.

import triton
import triton.language as tl

from .dispatch import UNALIGNED, supports_dependent_launch
from .launch import launch
from .launch_sizes import cdiv, next_power_of_2
from .reference import NULL_SLOT
from .triton_helpers import convolve_last


@triton.jit(do_not_specialize=["batch", "index_stride"], do_not_specialize_on_alignment=UNALIGNED)
def _causal_conv1d_update_kernel(
    x_ptr, weight_ptr, bias_ptr, state_ptr, out_ptr, state_indices_ptr,
    batch, x_stride, out_stride, index_stride, slot_stride, channel_stride, tap_stride,
    channels: tl.constexpr, WIDTH: tl.constexpr, NULL: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, TAPS: tl.constexpr, launch_pdl: tl.constexpr,
):  # fmt: skip
    """ROWS sequences and a block of channels, which share the weights. TAPS: WIDTH, padded to a power of two.

    launch_pdl: the kernel may start before the one in front of it ends (programmatic dependent launch). What it reads
    until it waits was written long before: slots, the state, weights.
    """
    # rows and slots in int64: slots x stride passes 2^31
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    is_channel = channel < channels
    is_own = (row < batch)[:, None] & is_channel[None, :]
    slot = tl.load(state_indices_ptr + row * index_stride, mask=row < batch, other=NULL).to(tl.int64)
    has_state = (slot != NULL)[:, None] & is_channel[None, :]
    state_ptrs = state_ptr + slot[:, None] * slot_stride + channel[None, :] * channel_stride
    window = ()
    for k in tl.static_range(WIDTH - 1):
        window = window + (tl.load(state_ptrs + k * tap_stride, mask=has_state, other=0.0),)
    tap = tl.arange(0, TAPS)
    # one load of all taps: they are neighbours in memory, channels are not
    weights = tl.load(
        weight_ptr + channel[:, None] * WIDTH + tap[None, :],
        mask=is_channel[:, None] & (tap < WIDTH)[None, :],
        other=0.0,
    ).to(tl.float32)
    y = tl.zeros((ROWS, BLOCK_CHANNELS), tl.float32)
    if HAS_BIAS:
        y += tl.load(bias_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    for k in tl.static_range(WIDTH - 1):
        y += tl.sum(tl.where(tap[None, :] == k, weights, 0.0), 1)[None, :] * window[k].to(tl.float32)
    last_weight = tl.sum(tl.where(tap[None, :] == WIDTH - 1, weights, 0.0), 1)[None, :]
    if launch_pdl:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()

    x = tl.load(x_ptr + row[:, None] * x_stride + channel[None, :], mask=is_own, other=0.0)
    y = convolve_last(y, last_weight, x, window, state_ptrs, tap_stride, has_state, WIDTH, SILU)
    tl.store(out_ptr + row[:, None] * out_stride + channel[None, :], y.to(out_ptr.dtype.element_ty), mask=is_own)


def _launch_sizes(batch: int) -> tuple[int, int, int]:
    """(sequences and channels a program, warps); benchmarks/decode_sizes.py tries them."""
    return (1, 128, 1) if batch <= 16 else (4, 128, 1) if batch <= 128 else (8, 128, 2)


def causal_conv1d_update_triton(x, weight, bias, conv_state, state_indices, silu, out) -> None:
    """Launch for checked arguments; see :func:`kernels.causal_conv1d_update.causal_conv1d_update`."""
    (batch, channels), width = x.shape, weight.shape[1]
    rows, block, warps = _launch_sizes(batch)
    launch(_causal_conv1d_update_kernel, (cdiv(channels, block), cdiv(batch, rows)), x)(
        # an unused pointer argument still needs a tensor
        x, weight, x if bias is None else bias, conv_state, out, state_indices,
        batch, x.stride(0), out.stride(0), state_indices.stride(0), *conv_state.stride(),
        channels=channels, WIDTH=width, NULL=NULL_SLOT, HAS_BIAS=bias is not None, SILU=silu,
        ROWS=rows, BLOCK_CHANNELS=block, TAPS=next_power_of_2(width), num_warps=warps,
        launch_pdl=supports_dependent_launch(x.device),
    )  # fmt: skip
