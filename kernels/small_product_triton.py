"""Triton kernel of :mod:`kernels.small_product`; imported by the wrapper only where Triton can run."""

# mypy: ignore-errors
# Triton's language looks like Python but does not have its types.

import triton
import triton.language as tl

from .compile_ahead import launch
from .dispatch import supports_dependent_launch
from .triton_helpers import silu

# A weight is read once.
_ONCE: tl.constexpr = tl.constexpr("evict_first")


@triton.jit(do_not_specialize=["tokens"])
def _small_product_kernel(
    x_ptr, weight_ptr, gate_ptr, norm_weight_ptr, out_ptr, tokens, x_stride, gate_stride, out_stride, eps,
    N: tl.constexpr, K: tl.constexpr, NORM: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, launch_pdl: tl.constexpr,
):  # fmt: skip
    """A block of features for all tokens. The norm's factor of a token is applied to its sums.

    launch_pdl: the kernel may start before the one in front of it ends (programmatic dependent launch), and reads the
    first block of its weight meanwhile.
    """
    feature = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    row = tl.arange(0, ROWS)
    is_feature, is_row = (feature < N)[:, None], (row < tokens)[:, None]
    weight_rows = weight_ptr + feature.to(tl.int64)[:, None] * K
    first = tl.load(weight_rows + k[None, :], mask=is_feature & (k < K)[None, :], other=0.0, eviction_policy=_ONCE)
    if launch_pdl:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()

    sums = tl.zeros((ROWS, BLOCK_N, BLOCK_K), tl.float32)
    squares = tl.zeros((ROWS, BLOCK_K), tl.float32)
    for start in tl.static_range(0, K, BLOCK_K):
        # a constant where all blocks are full, so that nothing is left of it
        is_k = (start + k < K) if start + BLOCK_K > K else tl.full((BLOCK_K,), True, tl.int1)
        x = tl.load(x_ptr + row[:, None] * x_stride + start + k[None, :], mask=is_row & is_k[None, :], other=0.0)
        x = x.to(tl.float32)
        if NORM:
            gate_ptrs = gate_ptr + row[:, None] * gate_stride + start + k[None, :]
            x *= silu(tl.load(gate_ptrs, mask=is_row & is_k[None, :], other=0.0).to(tl.float32))
            squares += x * x
            x *= tl.load(norm_weight_ptr + start + k, mask=is_k, other=0.0).to(tl.float32)[None, :]
        if start == 0:
            weight = first
        else:
            mask = is_feature & is_k[None, :]
            weight = tl.load(weight_rows + start + k[None, :], mask=mask, other=0.0, eviction_policy=_ONCE)
        sums += x[:, None, :] * weight.to(tl.float32)[None, :, :]
    out = tl.sum(sums, 2)
    if NORM:
        out *= tl.rsqrt(tl.sum(squares, 1) / K + eps)[:, None]
    out_ptrs = out_ptr + row[:, None] * out_stride + feature[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=is_row & (feature < N)[None, :])


def _launch_sizes(features: int, tokens: int) -> tuple[int, int, int]:
    """(features a program, inputs read at once, warps); benchmarks/small_products.py tries them."""
    if features > 4096:
        return 8, 256, 4
    return (4, 512, 4) if tokens > 1 and features > 1024 else (4, 1024, 8)


def small_product_triton(x, weight, gate, norm_weight, eps, out, sizes=None) -> None:
    """Launch for checked arguments; see :func:`kernels.small_product.small_product`.

    Args:
        sizes: (features a program, inputs read at once, warps); None to choose.
    """
    (features, inputs), tokens = weight.shape, len(x)
    block_n, block_k, warps = _launch_sizes(features, tokens) if sizes is None else sizes
    # an unused pointer argument still needs a tensor
    gates = (x, x) if gate is None else (gate, norm_weight)
    launch(_small_product_kernel, (triton.cdiv(features, block_n),), x)(
        x, weight, *gates, out, tokens, x.stride(0), gates[0].stride(0), out.stride(0), eps,
        N=features, K=inputs, NORM=gate is not None, ROWS=triton.next_power_of_2(tokens), BLOCK_N=block_n,
        BLOCK_K=min(block_k, triton.next_power_of_2(inputs)), num_warps=warps,
        launch_pdl=supports_dependent_launch(x.device),
    )  # fmt: skip
