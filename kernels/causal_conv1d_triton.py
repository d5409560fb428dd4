"""Triton kernel of :mod:`kernels.causal_conv1d`; imported by the wrapper only where Triton can run."""

# mypy: ignore-errors
# ruff: noqa: RUF005, SIM102
# Triton's language looks like Python but has neither its types nor starred tuples.

import torch
import triton
import triton.language as tl

from .dispatch import UNALIGNED
from .launch import launch
from .launch_sizes import cdiv, next_power_of_2
from .reference import NULL_SLOT
from .triton_helpers import filter_raw_dt, find_sequence, silu

# measured on an H200 (benchmarks/notes.md): a warp has some neighbouring channels and walks over a part of a sequence
PART = 16
LARGEST_BLOCK = 128
SMALLEST_BLOCK = 64
NUM_WARPS = 1
# tokens that are loaded at once
GROUP = 8
# tokens of dt that are filtered at once
FILTER_TOKENS = 16


@triton.jit
def _convolved(values, row, weight, bias, WIDTH: tl.constexpr, SILU: tl.constexpr):
    """One token: the last WIDTH - 1 inputs, and its own, give those behind it and the output."""
    row = row.to(tl.float32)
    y = bias + row * weight[WIDTH - 1]
    shifted = ()
    for tap in tl.static_range(WIDTH - 1):
        y += values[tap] * weight[tap]
        if tap > 0:
            shifted = shifted + (values[tap],)
    if SILU:
        y = silu(y)
    return shifted + (row,), y


@triton.jit
def _filter_part(
    dt_ptr, dt_bias_ptr, threshold_ptr, first, end, dt_stride,
    nheads: tl.constexpr, BLOCK_HEADS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Filter the raw dt of tokens ``first`` to ``end``, from ``dt_ptr`` on."""
    head = tl.arange(0, BLOCK_HEADS)
    dt_bias = tl.load(dt_bias_ptr + head, mask=head < nheads, other=0.0).to(tl.float32)
    threshold = tl.load(threshold_ptr + head, mask=head < nheads, other=-1.0)
    for group in range(first, end, TOKENS):
        position = group + tl.arange(0, TOKENS)
        mask = (position < end)[:, None] & (head < nheads)[None, :]
        dt_ptrs = dt_ptr + position.to(tl.int64)[:, None] * dt_stride + head[None, :]
        filter_raw_dt(dt_ptrs, dt_bias[None, :], threshold[None, :], mask)


@triton.jit(do_not_specialize=["nseq", "search_depth", "index_stride"], do_not_specialize_on_alignment=UNALIGNED)
def _causal_conv1d_kernel(
    x_ptr, weight_ptr, bias_ptr, state_ptr, out_ptr,
    query_start_loc_ptr, state_indices_ptr, has_initial_state_ptr,
    dt_ptr, dt_bias_ptr, dt_threshold_ptr, seq_rows_ptr, seq_prompt_tokens_ptr,
    nseq, search_depth, x_stride, out_stride, dt_stride, index_stride, slot_stride, channel_stride, tap_stride,
    channels: tl.constexpr, nheads: tl.constexpr, WIDTH: tl.constexpr, NULL: tl.constexpr,
    HAS_BIAS: tl.constexpr, SILU: tl.constexpr, FILTER: tl.constexpr,
    PART: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, T: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, FILTER_TOKENS: tl.constexpr,
):  # fmt: skip
    """A part of one sequence: a block of channels, or, in the last program of each part, the filter of dt."""
    BLOCKS: tl.constexpr = (channels + BLOCK_CHANNELS - 1) // BLOCK_CHANNELS
    PROGRAMS: tl.constexpr = BLOCKS + 1 if FILTER else BLOCKS
    block = tl.program_id(0) % PROGRAMS
    part = tl.program_id(0) // PROGRAMS
    sequence = find_sequence(query_start_loc_ptr, part, nseq, PART, search_depth)
    # token numbers in int64: tokens x row stride passes 2^31
    start = tl.load(query_start_loc_ptr + sequence).to(tl.int64)
    n_tokens = tl.load(query_start_loc_ptr + sequence + 1) - start
    first = (part - start // PART - sequence) * PART
    end = tl.minimum(n_tokens, first + PART)
    slot = tl.load(state_indices_ptr + sequence * index_stride).to(tl.int64)
    if slot == NULL:
        return
    if first >= n_tokens:
        return

    if FILTER:
        if block == BLOCKS:
            row = tl.load(seq_rows_ptr + sequence).to(tl.int64)
            if row > 0:
                filtered_end = tl.minimum(end, tl.load(seq_prompt_tokens_ptr + sequence))
                _filter_part(
                    dt_ptr + start * dt_stride, dt_bias_ptr, dt_threshold_ptr + row * nheads, first, filtered_end,
                    dt_stride, nheads, BLOCK_HEADS, FILTER_TOKENS,
                )  # fmt: skip
            return

    channel = block * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    if channels % BLOCK_CHANNELS != 0:
        # surplus channels repeat the last ones: they compute and store the same
        channel = tl.minimum(channel, channels - 1)
    bias = tl.zeros((BLOCK_CHANNELS,), tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + channel).to(tl.float32)
    weight = ()
    for tap in tl.static_range(WIDTH):
        weight = weight + (tl.load(weight_ptr + channel * WIDTH + tap).to(tl.float32),)
    x_ptrs = x_ptr + start * x_stride + channel
    out_ptrs = out_ptr + start * out_stride + channel
    state_ptrs = state_ptr + slot * slot_stride + channel * channel_stride

    # what lies in front of the part: tokens, or the old state in front of the sequence
    is_initial = (first == 0) & (tl.load(has_initial_state_ptr + sequence) != 0)
    old_channels = tl.where(is_initial, channels, 0)
    front_channels = tl.where(first > 0, channels, 0)
    values = ()
    for tap in tl.static_range(WIDTH - 1):
        old = tl.load(state_ptrs + tap * tap_stride, mask=channel < old_channels, other=0.0).to(tl.float32)
        front_ptrs = x_ptrs + (first + tap - WIDTH + 1) * x_stride
        values = values + (old + tl.load(front_ptrs, mask=channel < front_channels, other=0.0).to(tl.float32),)
    whole = first + (end - first) // T * T
    for group in range(first, whole, T):
        rows = ()
        for i in tl.static_range(T):
            rows = rows + (tl.load(x_ptrs + (group + i) * x_stride),)
        for i in tl.static_range(T):
            values, y = _convolved(values, rows[i], weight, bias, WIDTH, SILU)
            tl.store(out_ptrs + (group + i) * out_stride, y.to(out_ptr.dtype.element_ty))
    for t in range(whole, end):
        values, y = _convolved(values, tl.load(x_ptrs + t * x_stride), weight, bias, WIDTH, SILU)
        tl.store(out_ptrs + t * out_stride, y.to(out_ptr.dtype.element_ty))

    # the part that read the old state writes the new one
    if first == 0:
        # all threads have read the old state before any writes the new one
        tl.debug_barrier()
        for tap in tl.static_range(WIDTH - 1):
            new = values[tap]
            if n_tokens > PART:
                new = tl.load(x_ptrs + (n_tokens + tap - WIDTH + 1) * x_stride).to(tl.float32)
            tl.store(state_ptrs + tap * tap_stride, new.to(state_ptr.dtype.element_ty))


def causal_conv1d_triton(
    x, weight, bias, conv_state, query_start_loc, state_indices, has_initial_state,
    dt, dt_bias, dt_threshold, seq_rows, seq_prompt_tokens, silu, out,
) -> None:  # fmt: skip
    """Launch for checked arguments; see :func:`kernels.causal_conv1d.causal_conv1d`."""
    (tokens, channels), nseq = x.shape, state_indices.shape[0]
    is_filtered = dt_threshold is not None
    block = LARGEST_BLOCK
    while channels % block and block > SMALLEST_BLOCK:
        block //= 2
    programs = cdiv(channels, block) + is_filtered
    nheads = dt.shape[1] if is_filtered else 1
    # an unused pointer argument still needs a tensor
    filters = (dt, dt_bias, dt_threshold, seq_rows, seq_prompt_tokens) if is_filtered else (x,) * 5
    launch(_causal_conv1d_kernel, (programs * (tokens // PART + nseq),), x)(
        x, weight, x if bias is None else bias, conv_state, out,
        query_start_loc, state_indices, has_initial_state.view(torch.uint8), *filters,
        nseq, (nseq - 1).bit_length(), x.stride(0), out.stride(0), dt.stride(0) if is_filtered else 0,
        state_indices.stride(0), *conv_state.stride(),
        channels=channels, nheads=nheads, WIDTH=weight.shape[1], NULL=NULL_SLOT,
        HAS_BIAS=bias is not None, SILU=silu, FILTER=is_filtered,
        PART=PART, BLOCK_CHANNELS=block, T=GROUP,
        BLOCK_HEADS=next_power_of_2(nheads), FILTER_TOKENS=FILTER_TOKENS, num_warps=NUM_WARPS,
    )  # fmt: skip
