"""Triton kernel of :mod:`kernels.causal_conv1d`; imported by the wrapper only where Triton can run."""

# mypy: ignore-errors
# ruff: noqa: RUF005
# Triton's language looks like Python but has neither its types nor starred tuples.

import torch
import triton
import triton.language as tl

from .dispatch import UNALIGNED
from .reference import NULL_SLOT
from .triton_helpers import filter_raw_dt, find_sequence, silu

# measured on an H200 (benchmarks/notes.md)
BLOCK_TOKENS = 64
BLOCK_CHANNELS = 64
NUM_WARPS = 4


@triton.jit(do_not_specialize=["nseq", "search_depth", "index_stride"], do_not_specialize_on_alignment=UNALIGNED)
def _causal_conv1d_kernel(
    x_ptr, weight_ptr, bias_ptr, state_ptr, out_ptr,
    query_start_loc_ptr, state_indices_ptr, has_initial_state_ptr,
    dt_ptr, dt_bias_ptr, dt_threshold_ptr, seq_rows_ptr, seq_prompt_tokens_ptr,
    nseq, search_depth, x_stride, out_stride, dt_stride, index_stride, slot_stride, channel_stride, tap_stride,
    channels: tl.constexpr, nheads: tl.constexpr, WIDTH: tl.constexpr, NULL: tl.constexpr,
    HAS_BIAS: tl.constexpr, SILU: tl.constexpr, FILTER: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK_HEADS: tl.constexpr,
):  # fmt: skip
    """Some tokens of one sequence: a block of channels, or, in the last program of each part, the filter of dt."""
    BLOCKS: tl.constexpr = (channels + BLOCK_CHANNELS - 1) // BLOCK_CHANNELS
    PROGRAMS: tl.constexpr = BLOCKS + 1 if FILTER else BLOCKS
    block = tl.program_id(0) % PROGRAMS
    part = tl.program_id(0) // PROGRAMS
    sequence = find_sequence(query_start_loc_ptr, part, nseq, BLOCK_TOKENS, search_depth)
    start = tl.load(query_start_loc_ptr + sequence)
    n_tokens = tl.load(query_start_loc_ptr + sequence + 1) - start
    first = (part - start // BLOCK_TOKENS - sequence) * BLOCK_TOKENS
    slot = tl.load(state_indices_ptr + sequence * index_stride).to(tl.int64)
    if slot == NULL:
        return
    if first >= n_tokens:
        return
    position = first + tl.arange(0, BLOCK_TOKENS)
    is_token = position < n_tokens
    # token numbers in int64: tokens x row stride passes 2^31
    token = start.to(tl.int64) + position

    if block == BLOCKS:
        row = tl.load(seq_rows_ptr + sequence).to(tl.int64)
        if row > 0:
            head = tl.arange(0, BLOCK_HEADS)
            is_prompt = is_token & (position < tl.load(seq_prompt_tokens_ptr + sequence))
            mask = is_prompt[:, None] & (head < nheads)[None, :]
            dt_ptrs = dt_ptr + token[:, None] * dt_stride + head[None, :]
            dt_bias = tl.load(dt_bias_ptr + head, mask=head < nheads, other=0.0).to(tl.float32)
            threshold = tl.load(dt_threshold_ptr + row * nheads + head, mask=head < nheads, other=-1.0)
            filter_raw_dt(dt_ptrs, dt_bias[None, :], threshold[None, :], mask)
        return

    channel = block * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    is_channel = channel < channels
    bias = tl.zeros((BLOCK_CHANNELS,), tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)
    weight = ()
    for tap in tl.static_range(WIDTH):
        weight = weight + (tl.load(weight_ptr + channel * WIDTH + tap, mask=is_channel, other=0.0).to(tl.float32),)
    # the first WIDTH - 1 tokens of a sequence come below
    is_token &= position >= WIDTH - 1
    y = tl.zeros((BLOCK_TOKENS, BLOCK_CHANNELS), tl.float32) + bias[None, :]
    for tap in tl.static_range(WIDTH):
        x_ptrs = x_ptr + (token + (tap - WIDTH + 1))[:, None] * x_stride + channel[None, :]
        x = tl.load(x_ptrs, mask=is_token[:, None] & is_channel[None, :], other=0.0)
        y += x.to(tl.float32) * weight[tap][None, :]
    out_ptrs = out_ptr + token[:, None] * out_stride + channel[None, :]
    if SILU:
        y = silu(y)
    tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=is_token[:, None] & is_channel[None, :])

    if first == 0:
        start_x_ptrs = x_ptr + start.to(tl.int64) * x_stride + channel
        start_out_ptrs = out_ptr + start.to(tl.int64) * out_stride + channel
        state_ptrs = state_ptr + slot * slot_stride + channel * channel_stride
        old_channels = tl.where(tl.load(has_initial_state_ptr + sequence) != 0, channels, 0)
        # the old state, then the first tokens
        values = ()
        for tap in tl.static_range(WIDTH - 1):
            old = tl.load(state_ptrs + tap * tap_stride, mask=channel < old_channels, other=0.0)
            values = values + (old.to(tl.float32),)
        for t in tl.static_range(WIDTH - 1):
            mask = channel < tl.where(t < n_tokens, channels, 0)
            values = values + (tl.load(start_x_ptrs + t * x_stride, mask=mask, other=0.0).to(tl.float32),)
        for t in tl.static_range(WIDTH - 1):
            first_y = bias
            for tap in tl.static_range(WIDTH):
                first_y += values[t + tap] * weight[tap]
            mask = channel < tl.where(t < n_tokens, channels, 0)
            if SILU:
                first_y = silu(first_y)
            tl.store(start_out_ptrs + t * out_stride, first_y.to(out_ptr.dtype.element_ty), mask=mask)
        new = ()
        for tap in tl.static_range(WIDTH - 1):
            kept = n_tokens + tap - (WIDTH - 1)
            mask = channel < tl.where(kept >= 0, channels, 0)
            value = tl.load(start_x_ptrs + kept.to(tl.int64) * x_stride, mask=mask, other=0.0).to(tl.float32)
            for k in tl.static_range(WIDTH - 1):
                value = tl.where(n_tokens + tap == k, values[k], value)
            new = new + (value,)
        # all threads have read the old state before any writes the new one
        tl.debug_barrier()
        for tap in tl.static_range(WIDTH - 1):
            tl.store(state_ptrs + tap * tap_stride, new[tap].to(state_ptr.dtype.element_ty), mask=is_channel)


def causal_conv1d_triton(
    x, weight, bias, conv_state, query_start_loc, state_indices, has_initial_state,
    dt, dt_bias, dt_threshold, seq_rows, seq_prompt_tokens, silu, out,
) -> None:  # fmt: skip
    """Launch for checked arguments; see :func:`kernels.causal_conv1d.causal_conv1d`."""
    (tokens, channels), nseq = x.shape, len(state_indices)
    is_filtered = dt_threshold is not None
    programs = triton.cdiv(channels, BLOCK_CHANNELS) + is_filtered
    nheads = dt.shape[1] if is_filtered else 1
    # an unused pointer argument still needs a tensor
    filters = (dt, dt_bias, dt_threshold, seq_rows, seq_prompt_tokens) if is_filtered else (x,) * 5
    _causal_conv1d_kernel[(programs * (tokens // BLOCK_TOKENS + nseq),)](
        x, weight, x if bias is None else bias, conv_state, out,
        query_start_loc, state_indices, has_initial_state.view(torch.uint8), *filters,
        nseq, (nseq - 1).bit_length(), x.stride(0), out.stride(0), dt.stride(0) if is_filtered else 0,
        state_indices.stride(0), *conv_state.stride(),
        channels=channels, nheads=nheads, WIDTH=weight.shape[1], NULL=NULL_SLOT,
        HAS_BIAS=bias is not None, SILU=silu, FILTER=is_filtered,
        BLOCK_TOKENS=BLOCK_TOKENS, BLOCK_CHANNELS=BLOCK_CHANNELS, BLOCK_HEADS=triton.next_power_of_2(nheads),
        num_warps=NUM_WARPS,
    )  # fmt: skip
