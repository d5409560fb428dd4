"""Triton kernel of :mod:`kernels.filter_dt`; imported by the wrapper only where Triton can run."""

# mypy: ignore-errors
# Triton's language looks like Python but does not have its types.

import torch
import triton
import triton.language as tl

from .dispatch import UNALIGNED

BLOCK_TOKENS = 8
BLOCK_CHANNELS = 128


@triton.jit
def _softplus(v):
    """``log1p(exp(v))`` to 3e-7 relative. Every kernel that filters uses this one, so that all decide alike.

    Written as ``max(v, 0) + log1p(exp(-|v|))``, and log1p(e) on [0, 1] as e times a fitted polynomial: one exponential,
    no logarithm, no division.
    """
    e = tl.exp2(-1.4426950408889634 * tl.abs(v))
    p = e * 0.005253457929939032 - 0.02958850748836994
    p = p * e + 0.07836166769266129
    p = p * e - 0.13674770295619965
    p = p * e + 0.19111430644989014
    p = p * e - 0.24844369292259216
    p = p * e + 0.33319270610809326
    p = p * e - 0.49999502301216125
    p = p * e + 1.0
    return tl.maximum(v, 0.0) + e * p


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
        raw = tl.load(dt_ptrs, mask=mask, other=0.0).to(tl.float32)
        threshold_ptrs = dt_threshold_ptr + row.to(tl.int64)[:, None] * channels + channel[None, :]
        threshold = tl.load(threshold_ptrs, mask=mask, other=-1.0)
        is_filtered = _softplus(raw + dt_bias[None, :]) <= threshold
        minus_infinity = tl.full((BLOCK_TOKENS, BLOCK_CHANNELS), float("-inf"), tl.float32)
        tl.store(dt_ptrs, minus_infinity.to(dt_ptr.dtype.element_ty), mask=mask & is_filtered)


def filter_dt_triton_(
    dt: torch.Tensor, dt_bias: torch.Tensor, dt_threshold: torch.Tensor, token_rows: torch.Tensor
) -> None:
    """Launch for checked arguments; see :func:`kernels.filter_dt.filter_dt_`."""
    tokens, channels = dt.shape
    if tokens == 0:
        return
    grid = (triton.cdiv(tokens, BLOCK_TOKENS), triton.cdiv(channels, BLOCK_CHANNELS))
    _filter_dt_kernel[grid](
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
