"""What several Triton kernels of this package share."""

# mypy: ignore-errors
# Triton's language looks like Python but does not have its types.

import triton
import triton.language as tl


@triton.jit
def softplus(v):
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


@triton.jit
def silu(v):
    """``v * sigmoid(v)``."""
    return v / (1.0 + tl.exp2(-1.4426950408889634 * v))


@triton.jit
def convolve_last(y, weight, x, window, state_ptrs, tap_stride, has_state, WIDTH: tl.constexpr, SILU: tl.constexpr):
    """Add the newest input to a convolution, and move the state by it.

    y: the sum over the WIDTH - 1 inputs of `window`, which came from `state_ptrs`, `tap_stride` apart. weight: of x.
    """
    # all threads have read the old state before any writes the new one
    tl.debug_barrier()
    for tap in tl.static_range(WIDTH - 2):
        tl.store(state_ptrs + tap * tap_stride, window[tap + 1], mask=has_state)
    tl.store(state_ptrs + (WIDTH - 2) * tap_stride, x.to(state_ptrs.dtype.element_ty), mask=has_state)
    y += weight * x.to(tl.float32)
    if SILU:
        y = silu(y)
    return y


@triton.jit
def filtered_dt(raw, dt_bias, threshold, is_prompt, FILTER: tl.constexpr):
    """``softplus(raw + dt_bias)``, and 0 where LongMamba filters a prompt token: where it is at most the threshold."""
    dt = softplus(raw.to(tl.float32) + dt_bias)
    if FILTER:
        dt = tl.where(is_prompt & (dt <= threshold), 0.0, dt)
    return dt


@triton.jit
def filter_raw_dt(dt_ptrs, dt_bias, threshold, mask):
    """Write -inf over a raw dt that LongMamba filters: softplus makes it exactly 0."""
    raw = tl.load(dt_ptrs, mask=mask, other=0.0).to(tl.float32)
    minus_infinity = tl.full(raw.shape, float("-inf"), tl.float32).to(dt_ptrs.dtype.element_ty)
    tl.store(dt_ptrs, minus_infinity, mask=mask & (softplus(raw + dt_bias) <= threshold))


@triton.jit
def find_sequence(query_start_loc_ptr, part, nseq, chunk_size, search_depth):
    """The sequence of a chunk: the last s with ``query_start_loc[s] // chunk_size + s <= part``.

    The chunks of a sequence are numbered from ``query_start_loc[s] // chunk_size + s``. These ranges never overlap,
    whatever the lengths, so that the host needs only shapes.
    """
    sequence = part * 0
    for k in range(0, search_depth):
        candidate = sequence + (1 << (search_depth - 1 - k))
        exists = candidate < nseq
        first = tl.load(query_start_loc_ptr + candidate, mask=exists, other=0) // chunk_size + candidate
        sequence = tl.where(exists & (first <= part), candidate, sequence)
    return sequence
