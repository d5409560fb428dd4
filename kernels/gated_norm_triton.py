"""Triton kernels of :mod:`kernels.gated_norm`; imported by the wrapper only where Triton can run."""

# mypy: ignore-errors
# Triton's language looks like Python but does not have its types.

import torch
import triton
import triton.language as tl

from .compile_ahead import launch
from .dispatch import supports_dependent_launch
from .triton_helpers import silu


@triton.jit
def _store_scale(scale_ptrs, squares, d_inner: tl.constexpr, eps, mask):
    """Write the factor of rows whose squares add up to ``squares`` as the sum of two numbers."""
    factor = tl.rsqrt(squares / d_inner + eps)
    high = factor.to(scale_ptrs.dtype.element_ty)
    tl.store(scale_ptrs, high, mask=mask)
    tl.store(scale_ptrs + 1, (factor - high.to(tl.float32)).to(scale_ptrs.dtype.element_ty), mask=mask)


@triton.jit
def _gated_norm_kernel(
    y_ptr, z_ptr, weight_ptr, scale_ptr, y_stride, z_stride, scale_stride, eps,
    d_inner: tl.constexpr, BLOCK: tl.constexpr, launch_pdl: tl.constexpr,
):  # fmt: skip
    """One row. launch_pdl: only y comes from the kernel in front, the gate is older."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    is_channel = channel < d_inner
    z = tl.load(z_ptr + row * z_stride + channel, mask=is_channel, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)
    if launch_pdl:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    y_ptrs = y_ptr + row * y_stride + channel
    gated = tl.load(y_ptrs, mask=is_channel, other=0.0).to(tl.float32) * silu(z)
    tl.store(y_ptrs, (gated * weight).to(y_ptr.dtype.element_ty), mask=is_channel)
    _store_scale(scale_ptr + row * scale_stride, tl.sum(gated * gated, 0), d_inner, eps, True)


@triton.jit(do_not_specialize=["tokens"])
def _row_scale_kernel(
    squares_ptr, scale_ptr, tokens, scale_stride, eps,
    nheads: tl.constexpr, d_inner: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    """The factors of some tokens, from the squares that each head's channels add up to: (nheads, tokens)."""
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    head = tl.arange(0, BLOCK_HEADS)
    is_token = token < tokens
    offsets = head.to(tl.int64)[:, None] * tokens + token[None, :]
    squares = tl.load(squares_ptr + offsets, mask=(head < nheads)[:, None] & is_token[None, :], other=0.0)
    _store_scale(scale_ptr + token.to(tl.int64) * scale_stride, tl.sum(squares, 0), d_inner, eps, is_token)


def gated_norm_triton_(
    y: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, eps: float, row_scale: torch.Tensor
) -> None:
    """Launch for checked arguments; see :func:`kernels.gated_norm.gated_norm_`."""
    d_inner = y.shape[1]
    block = triton.next_power_of_2(d_inner)
    launch(_gated_norm_kernel, (len(y),), y)(
        y, z, weight, row_scale, y.stride(0), z.stride(0), row_scale.stride(0), eps,
        d_inner=d_inner, BLOCK=block, launch_pdl=supports_dependent_launch(y.device),
        num_warps=min(max(block // 512, 1), 16),
    )  # fmt: skip


def row_scale_triton(squares: torch.Tensor, d_inner: int, eps: float, row_scale: torch.Tensor) -> None:
    """Write ``row_scale`` (tokens, 2) from ``squares`` (nheads, tokens); see :func:`kernels.gated_norm.gated_norm_`."""
    nheads, tokens = squares.shape
    launch(_row_scale_kernel, (triton.cdiv(tokens, 64),), squares)(
        squares, row_scale, tokens, row_scale.stride(0), eps,
        nheads=nheads, d_inner=d_inner, BLOCK_HEADS=triton.next_power_of_2(nheads), BLOCK_TOKENS=64, num_warps=4,
    )  # fmt: skip
