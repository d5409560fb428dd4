"""A product of few tokens with a large weight that is read while the launch in front of it ends; not in the product."""

# mypy: ignore-errors
# Triton's language looks like Python but does not have its types.

from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vllm_longmamba.kernels.dispatch import supports_dependent_launch
from vllm_longmamba.kernels.triton_helpers import silu


class Sizes(NamedTuple):
    """Of a launch.

    Attributes:
        features: of the weight, a program.
        block: inputs read at once.
        warps: of a program.
        prefetch: whether a program asks for all of its weight at once, into the GPU's own cache.
        dot: whether tensor cores multiply; otherwise every thread adds up, which is for few tokens.
    """

    features: int
    block: int
    warps: int
    prefetch: bool
    dot: bool


SUMS = [
    Sizes(features, block, warps, prefetch, dot=False)
    for features, block, warps in ((4, 512, 4), (4, 1024, 8), (8, 256, 4), (8, 512, 8))
    for prefetch in (False, True)
]
DOTS = [Sizes(features, 128, 4, prefetch, dot=True) for features in (16, 32, 64) for prefetch in (False, True)]
MOST_SUMMED = 4


def tried(batch: int) -> list[Sizes]:
    """Launch sizes worth a trial for so many tokens."""
    return [*(SUMS if batch <= MOST_SUMMED else []), *DOTS]


@triton.jit
def _small_product_kernel(
    x_ptr, z_ptr, norm_weight_ptr, weight_ptr, out_ptr, batch, x_stride, z_stride, out_stride, eps,
    N: tl.constexpr, K: tl.constexpr, NORM: tl.constexpr, DOT: tl.constexpr, PREFETCH: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, launch_pdl: tl.constexpr,
):  # fmt: skip
    """A block of the weight's rows for all tokens. NORM: the input is norm(x silu(z)) norm_weight, over all of K."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    row = tl.arange(0, ROWS)
    weight_rows = weight_ptr + n.to(tl.int64) * K
    if PREFETCH:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.u32 p, $2, 0; @p cp.async.bulk.prefetch.L2.global [$1], $3; mov.u32 $0, 0; }",
            "=r,l,r,r",
            [weight_rows, (n < N).to(tl.int32), tl.full([BLOCK_N], K * 2, tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    first = tl.load(weight_rows[:, None] + k[None, :], mask=(n < N)[:, None], other=0.0)
    if launch_pdl:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    squares = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((BLOCK_N, ROWS), tl.float32)
    parts = tl.zeros((ROWS, BLOCK_N, BLOCK_K if not DOT else 1), tl.float32)
    for start in tl.static_range(0, K, BLOCK_K):
        x = tl.load(x_ptr + row[:, None] * x_stride + (start + k)[None, :], mask=(row < batch)[:, None], other=0.0)
        if NORM:
            z = tl.load(z_ptr + row[:, None] * z_stride + (start + k)[None, :], mask=(row < batch)[:, None], other=0.0)
            gated = x.to(tl.float32) * silu(z.to(tl.float32))
            squares += tl.sum(gated * gated, 1)
            x = (gated * tl.load(norm_weight_ptr + start + k).to(tl.float32)[None, :]).to(x.dtype)
        if start == 0:
            weight = first
        else:
            weight = tl.load(weight_rows[:, None] + (start + k)[None, :], mask=(n < N)[:, None], other=0.0)
        if DOT:
            sums = tl.dot(weight, tl.trans(x), sums)
        else:
            parts += x.to(tl.float32)[:, None, :] * weight.to(tl.float32)[None, :, :]
    if not DOT:
        sums = tl.trans(tl.sum(parts, 2))
    if NORM:
        sums *= tl.rsqrt(squares / K + eps)[None, :]
    is_own = (n < N)[:, None] & (row < batch)[None, :]
    tl.store(out_ptr + row[None, :] * out_stride + n[:, None], sums.to(out_ptr.dtype.element_ty), mask=is_own)


def small_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    sizes: Sizes,
    gate: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    eps: float = 1e-5,
    only_compile: bool = False,
) -> None:
    """Write ``x @ weight.T`` to out; with a gate, of ``rms_norm(x * silu(gate)) * norm_weight``.

    Args:
        x: (tokens, K), last stride 1; at most 16 tokens with tensor cores, MOST_SUMMED without.
        weight: (N, K) in two bytes a number, contiguous; K a multiple of ``sizes.block``.
        out: (tokens, N), last stride 1.
        sizes: of the launch.
        gate: (tokens, K), last stride 1, or None.
        norm_weight: (K,), needed with a gate.
        eps: of the norm.
        only_compile: launch nothing.
    """
    (features, inputs), batch = weight.shape, len(x)
    gates = (x, x) if gate is None else (gate, norm_weight)
    grid = (triton.cdiv(features, sizes.features),)
    launch = partial(_small_product_kernel.warmup, grid=grid) if only_compile else _small_product_kernel[grid]
    launch(
        x, *gates, weight, out, batch, x.stride(0), gates[0].stride(0), out.stride(0), eps,
        N=features, K=inputs, NORM=gate is not None, DOT=sizes.dot, PREFETCH=sizes.prefetch,
        ROWS=16 if sizes.dot else triton.next_power_of_2(batch), BLOCK_N=sizes.features, BLOCK_K=sizes.block,
        num_warps=sizes.warps, launch_pdl=supports_dependent_launch(x.device),
    )  # fmt: skip
