"""Triton kernel of :mod:`kernels.small_product`; imported by the wrapper only where Triton can run."""

# mypy: ignore-errors
# ruff: noqa: RUF005
# Triton's language looks like Python but has neither its types nor starred tuples.

import triton
import triton.language as tl

from .dispatch import UNALIGNED, supports_dependent_launch
from .launch import launch
from .launch_sizes import cdiv, next_power_of_2
from .reference import NULL_SLOT
from .triton_helpers import convolve_last, silu

# A weight is read once.
_ONCE: tl.constexpr = tl.constexpr("evict_first")


@triton.jit(do_not_specialize=["tokens", "index_stride"], do_not_specialize_on_alignment=UNALIGNED)
def _small_product_kernel(
    x_ptr, weight_ptr, gate_ptr, norm_weight_ptr, conv_weight_ptr, conv_bias_ptr, conv_state_ptr, state_indices_ptr,
    out_ptr, tokens, x_stride, gate_stride, out_stride, index_stride, slot_stride, channel_stride, tap_stride, eps,
    N: tl.constexpr, K: tl.constexpr, NORM: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr,
    HAS_BIAS: tl.constexpr, SILU: tl.constexpr, NULL: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, AHEAD: tl.constexpr, launch_pdl: tl.constexpr,
):  # fmt: skip
    """A block of features for all tokens. The norm's factor of a token is applied to its sums.

    CHANNELS: how many of the first features are inputs of a convolution, each of which only one program has.

    launch_pdl: the kernel may start before the one in front of it ends (programmatic dependent launch). Meanwhile it
    reads the first AHEAD blocks of its weight, and what the convolution keeps of tokens before.
    """
    feature = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    row = tl.arange(0, ROWS)
    is_row = (row < tokens)[:, None]
    x_ptrs = x_ptr + row[:, None] * x_stride + k[None, :]
    if not NORM:
        # loaded once for each feature, in the threads that have the weight: none waits for another before the end
        x_ptrs = tl.broadcast_to(x_ptrs[:, None, :], (ROWS, BLOCK_N, BLOCK_K))
    weight_ptrs = weight_ptr + feature.to(tl.int64)[None, :, None] * K + k[None, None, :]
    is_feature = (feature < N)[None, :, None]
    if launch_pdl:
        tl.extra.cuda.gdc_launch_dependents()
    ahead = ()
    for block in tl.static_range(AHEAD):
        mask = is_feature & (block * BLOCK_K + k < K)[None, None, :]
        ahead = ahead + (tl.load(weight_ptrs + block * BLOCK_K, mask=mask, other=0.0, eviction_policy=_ONCE),)
    window = ()
    convolved = tl.zeros((ROWS, BLOCK_N), tl.float32)
    if CHANNELS > 0:
        is_channel = (feature < CHANNELS)[None, :]
        # rows and slots in int64: slots x stride passes 2^31
        indices_ptrs = state_indices_ptr + row.to(tl.int64) * index_stride
        slot = tl.load(indices_ptrs, mask=row < tokens, other=NULL).to(tl.int64)[:, None]
        has_state = (slot != NULL) & is_channel
        state_ptrs = conv_state_ptr + slot * slot_stride + feature[None, :] * channel_stride
        taps = conv_weight_ptr + feature[None, :] * WIDTH
        last_weight = tl.load(taps + WIDTH - 1, mask=is_channel, other=0.0).to(tl.float32)
        for tap in tl.static_range(WIDTH - 1):
            before = tl.load(state_ptrs + tap * tap_stride, mask=has_state, other=0.0)
            window = window + (before,)
            convolved += tl.load(taps + tap, mask=is_channel, other=0.0).to(tl.float32) * before.to(tl.float32)
        if HAS_BIAS:
            convolved += tl.load(conv_bias_ptr + feature[None, :], mask=is_channel, other=0.0).to(tl.float32)
    if launch_pdl:
        tl.extra.cuda.gdc_wait()

    sums = tl.zeros((ROWS, BLOCK_N, BLOCK_K), tl.float32)
    squares = tl.zeros((ROWS, BLOCK_K), tl.float32)
    for start in tl.static_range(0, K, BLOCK_K):
        # a constant where all blocks are full, so that nothing is left of it
        is_k = (start + k < K) if start + BLOCK_K > K else tl.full((BLOCK_K,), True, tl.int1)
        if NORM:
            x = tl.load(x_ptrs + start, mask=is_row & is_k[None, :], other=0.0).to(tl.float32)
            gate_ptrs = gate_ptr + row[:, None] * gate_stride + start + k[None, :]
            x *= silu(tl.load(gate_ptrs, mask=is_row & is_k[None, :], other=0.0).to(tl.float32))
            squares += x * x
            x *= tl.load(norm_weight_ptr + start + k, mask=is_k, other=0.0).to(tl.float32)[None, :]
            x = x[:, None, :]
        else:
            x = tl.load(x_ptrs + start, mask=is_row[:, :, None] & is_k[None, None, :], other=0.0).to(tl.float32)
        if start < AHEAD * BLOCK_K:
            weight = ahead[start // BLOCK_K]
        else:
            mask = is_feature & is_k[None, None, :]
            weight = tl.load(weight_ptrs + start, mask=mask, other=0.0, eviction_policy=_ONCE)
        sums += x * weight.to(tl.float32)
    out = tl.sum(sums, 2)
    if NORM:
        out *= tl.rsqrt(tl.sum(squares, 1) / K + eps)[:, None]
    out = out.to(out_ptr.dtype.element_ty)
    if CHANNELS > 0:
        convolved = convolve_last(convolved, last_weight, out, window, state_ptrs, tap_stride, has_state, WIDTH, SILU)
        out = tl.where(is_channel, convolved.to(out_ptr.dtype.element_ty), out)
    out_ptrs = out_ptr + row[:, None] * out_stride + feature[None, :]
    tl.store(out_ptrs, out, mask=is_row & (feature < N)[None, :])


def _launch_sizes(features: int, tokens: int) -> tuple[int, int, int, int]:
    """(features a program, inputs in a block, warps, most blocks ahead); benchmarks/small_products.py tries them."""
    if features > 4096:
        return 8, 256, 4, 1
    return (4, 512, 4, 8) if tokens > 1 and features > 1024 else (4, 1024, 8, 4)


def small_product_triton(x, weight, gate, norm_weight, eps, out, convolution=None, sizes=None) -> None:
    """Launch for checked arguments; see :func:`kernels.small_product.small_product`.

    Args:
        convolution: None, or its (weight, bias, state, state_indices, silu).
        sizes: (features a program, inputs in a block, warps, most blocks ahead); None to choose.
    """
    (features, inputs), tokens = weight.shape, len(x)
    block_n, block_k, warps, ahead = _launch_sizes(features, tokens) if sizes is None else sizes
    block_k = min(block_k, next_power_of_2(inputs))
    # an unused pointer argument still needs a tensor
    gates = (x, x) if gate is None else (gate, norm_weight)
    conv_weight, conv_bias, conv_state, state_indices, has_silu = convolution or (x, None, x[..., None], x, False)
    channels, width = (0, 2) if convolution is None else conv_weight.shape
    launch(_small_product_kernel, (cdiv(features, block_n),), x)(
        x, weight, *gates, conv_weight, x if conv_bias is None else conv_bias, conv_state, state_indices,
        out, tokens, x.stride(0), gates[0].stride(0), out.stride(0), state_indices.stride(0), *conv_state.stride(), eps,
        N=features, K=inputs, NORM=gate is not None, CHANNELS=channels, WIDTH=width, HAS_BIAS=conv_bias is not None,
        SILU=has_silu, NULL=NULL_SLOT, ROWS=next_power_of_2(tokens), BLOCK_N=block_n,
        BLOCK_K=block_k, AHEAD=min(ahead, cdiv(inputs, block_k)), num_warps=warps,
        launch_pdl=supports_dependent_launch(x.device),
    )  # fmt: skip
