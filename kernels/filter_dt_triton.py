"""Triton kernel of :mod:`kernels.filter_dt`; imported by the wrapper only where Triton can run."""

# mypy: ignore-errors
# Triton's language looks like Python but does not have its types.

import torch
import triton
import triton.language as tl

from .dispatch import UNALIGNED
from .launch import launch
from .launch_sizes import cdiv
from .triton_helpers import filter_raw_dt

BLOCK_TOKENS = 8
BLOCK_CHANNELS = 128


@triton.jit(do_not_specialize=["tokens"], do_not_specialize_on_alignment=UNALIGNED)
def _filter_dt_kernel(
    dt_ptr,
    dt_bias_ptr,
    dt_threshold_ptr,
    token_rows_ptr,
    tokens,
    channels,
    dt_stride,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    # token numbers in int64: tokens x row stride passes 2^31
    token = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    row = tl.load(token_rows_ptr + token, mask=token < tokens, other=0)
    if tl.max(row, 0) > 0:
        channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
        # row 0 filters nothing: its tokens are neither read nor written
        mask = (row > 0)[:, None] & (channel < channels)[None, :]
        dt_ptrs = dt_ptr + token[:, None] * dt_stride + channel[None, :]
        dt_bias = tl.load(dt_bias_ptr + channel, mask=channel < channels, other=0.0).to(tl.float32)
        threshold_ptrs = dt_threshold_ptr + row.to(tl.int64)[:, None] * channels + channel[None, :]
        threshold = tl.load(threshold_ptrs, mask=mask, other=-1.0)
        filter_raw_dt(dt_ptrs, dt_bias[None, :], threshold, mask)


def filter_dt_triton_(
    dt: torch.Tensor, dt_bias: torch.Tensor, dt_threshold: torch.Tensor, token_rows: torch.Tensor
) -> None:
    """Launch for checked arguments; see :func:`kernels.filter_dt.filter_dt_`."""
    tokens, channels = dt.shape
    if tokens == 0:
        return
    grid = (cdiv(tokens, BLOCK_TOKENS), cdiv(channels, BLOCK_CHANNELS))
    launch(_filter_dt_kernel, grid, dt)(
        dt,
        dt_bias,
        dt_threshold,
        token_rows,
        tokens,
        channels,
        dt.stride(0),
        BLOCK_TOKENS=BLOCK_TOKENS,
        BLOCK_CHANNELS=BLOCK_CHANNELS,
        num_warps=1,
    )
