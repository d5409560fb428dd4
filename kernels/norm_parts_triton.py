"""Triton kernel of :mod:`kernels.norm_parts`; imported by the wrapper only where Triton can run."""

# mypy: ignore-errors
# Triton's language looks like Python but does not have its types.

import triton
import triton.language as tl

from .dispatch import supports_dependent_launch
from .launch import launch
from .launch_sizes import cdiv, next_power_of_2

# From so many tokens on, a program has several.
MANY_TOKENS = 512
TOKENS_A_PROGRAM = 4


@triton.jit
def _norm_part(ptrs, is_row, weight_ptr, eps, size: tl.constexpr, BLOCK: tl.constexpr, HAS_WEIGHT: tl.constexpr):
    """One of the three parts of each row."""
    channel = tl.arange(0, BLOCK)
    is_own = is_row[:, None] & (channel < size)[None, :]
    x = tl.load(ptrs[:, None] + channel[None, :], mask=is_own, other=0.0).to(tl.float32)
    x *= tl.rsqrt(tl.sum(x * x, 1) / size + eps)[:, None]
    if HAS_WEIGHT:
        x *= tl.load(weight_ptr + channel, mask=channel < size, other=0.0).to(tl.float32)[None, :]
    tl.store(ptrs[:, None] + channel[None, :], x.to(ptrs.dtype.element_ty), mask=is_own)


@triton.jit(do_not_specialize=["tokens"])
def _norm_parts_kernel(
    x_ptr, dt_weight_ptr, B_weight_ptr, C_weight_ptr, tokens, x_stride, eps,
    rank: tl.constexpr, d_state: tl.constexpr, BLOCK_RANK: tl.constexpr, BLOCK_STATES: tl.constexpr,
    ROWS: tl.constexpr, HAS_WEIGHT: tl.constexpr, launch_pdl: tl.constexpr,
):  # fmt: skip
    """ROWS tokens. launch_pdl: the kernel may start before the one in front of it ends."""
    if launch_pdl:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    # rows in int64: rows x stride passes 2^31
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    ptrs = x_ptr + row * x_stride
    is_row = row < tokens
    _norm_part(ptrs, is_row, dt_weight_ptr, eps, rank, BLOCK_RANK, HAS_WEIGHT)
    _norm_part(ptrs + rank, is_row, B_weight_ptr, eps, d_state, BLOCK_STATES, HAS_WEIGHT)
    _norm_part(ptrs + rank + d_state, is_row, C_weight_ptr, eps, d_state, BLOCK_STATES, HAS_WEIGHT)


def norm_parts_triton(x, rank, d_state, eps, dt_weight, B_weight, C_weight) -> None:
    """Launch for checked arguments; see :func:`kernels.norm_parts.norm_parts_`."""
    tokens = x.shape[0]
    rows = TOKENS_A_PROGRAM if tokens >= MANY_TOKENS else 1
    # an unused pointer argument still needs a tensor
    weights = (x, x, x) if dt_weight is None else (dt_weight, B_weight, C_weight)
    launch(_norm_parts_kernel, (cdiv(tokens, rows),), x)(
        x, *weights, tokens, x.stride(0), eps,
        rank=rank, d_state=d_state, BLOCK_RANK=next_power_of_2(rank), BLOCK_STATES=next_power_of_2(d_state),
        ROWS=rows, HAS_WEIGHT=dt_weight is not None, num_warps=rows, launch_pdl=supports_dependent_launch(x.device),
    )  # fmt: skip
