"""The two large kernels of ssd: what a segment adds to the state, and the outputs.

A program runs through the blocks of a segment with the state of its heads, (HEADS x headdim, d_state), in registers:
the state goes through memory once a segment, not once a chunk. Everything is transposed, heads' channels down and
tokens across, so that the state is the left operand of its product with C as it lies in the registers.

Within a block, token i of a head needs the sum over j <= i of ``S[i, j] exp(a_i - a_j) dt_j x_j`` with S = C B^T and
a the running sum of the decay. Two ways:

- factored: ``exp(a_i + r) sum_j S[i, j] (exp(-r - a_j) dt_j x_j)``: S is the same for all heads of a group, and the
  state is kept times exp(-r), so that it is only added to. When the decay since the last time passes 2^-MOST_DECAY,
  the state is scaled anew: none of the exponentials leaves the range of float32 and bfloat16, and the result is as
  exact as the other. It takes the segments without a block that decays by more than that.
- exact: one exponential for each pair of tokens. It takes the other segments, and float16, whose exponents are too few.
"""

# mypy: ignore-errors
# ruff: noqa: RUF005
# Triton's language looks like Python but has neither its types nor starred tuples, and no `and` of run-time conditions.

import triton
import triton.language as tl

from .dispatch import UNALIGNED
from .triton_helpers import find_sequence


@triton.jit
def _across(values, channel, headdim: tl.constexpr, HEADS: tl.constexpr):
    """HEADS vectors over tokens -> (HEADS x headdim, tokens), or (1, tokens) of one head."""
    wide = values[0][None, :]
    for k in tl.static_range(1, HEADS):
        wide = tl.where((channel >= k * headdim)[:, None], values[k][None, :], wide)
    return wide


@triton.jit
def _down(values, channel, headdim: tl.constexpr, HEADS: tl.constexpr):
    """HEADS scalars -> (HEADS x headdim, 1), or a scalar of one head."""
    if HEADS == 1:
        wide = values[0]
    else:
        wide = tl.where(channel >= headdim, values[1], values[0])[:, None]
        for k in tl.static_range(2, HEADS):
            wide = tl.where((channel >= k * headdim)[:, None], values[k], wide)
    return wide


@triton.jit(
    do_not_specialize=["nseq", "search_depth", "tokens", "blocks", "index_stride"],
    do_not_specialize_on_alignment=UNALIGNED,
)
def _ssd_segment_state_kernel(
    x_ptr, B_ptr, weight_ptr, total_ptr, segment_state_ptr, segment_decay_ptr, query_start_loc_ptr, state_indices_ptr,
    nseq, search_depth, tokens, blocks, x_stride, B_stride, index_stride,
    nheads: tl.constexpr, headdim: tl.constexpr, ngroups: tl.constexpr, d_state: tl.constexpr, NULL: tl.constexpr,
    BLOCK: tl.constexpr, SEGMENT: tl.constexpr, HEADS: tl.constexpr, STATES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What a segment adds to the state of HEADS heads.

    segment_state: (segments, nheads x headdim, d_state); segment_decay, the sum of the totals: (segments, nheads).
    """
    CHANNELS: tl.constexpr = HEADS * headdim
    MOST_BLOCKS: tl.constexpr = SEGMENT // BLOCK
    part = tl.program_id(1)
    sequence = find_sequence(query_start_loc_ptr, part, nseq, SEGMENT, search_depth)
    start = tl.load(query_start_loc_ptr + sequence)
    in_sequence = part - start // SEGMENT - sequence
    n_tokens = tl.minimum(tl.load(query_start_loc_ptr + sequence + 1) - start - in_sequence * SEGMENT, SEGMENT)
    if tl.load(state_indices_ptr + sequence * index_stride) == NULL:
        return
    if n_tokens <= 0:
        return
    first_block = start // BLOCK + sequence + in_sequence * MOST_BLOCKS
    n_blocks = (n_tokens + BLOCK - 1) // BLOCK
    head = tl.program_id(0) * HEADS
    group = head // (nheads // ngroups)
    channel = tl.arange(0, CHANNELS)
    n = tl.arange(0, STATES)
    position = tl.arange(0, BLOCK)
    # token numbers in int64: tokens x row stride passes 2^31
    base = start.to(tl.int64) + in_sequence * SEGMENT
    x_ptr += base * x_stride + head * headdim
    B_ptr += base * B_stride + group * d_state
    x_offsets = position[:, None] * x_stride + channel[None, :]
    B_offsets = position[:, None] * B_stride + n[None, :]
    is_state = (n < d_state)[None, :]

    # behind a decay of 2^-150 a float32 exponential is 0: such blocks are not even read
    block = tl.arange(0, MOST_BLOCKS)
    unread = n_blocks
    totals = ()
    for k in tl.static_range(HEADS):
        total_ptrs = total_ptr + (head + k).to(tl.int64) * blocks + first_block
        block_totals = tl.load(total_ptrs + block, mask=block < n_blocks, other=0.0)
        whole = tl.sum(block_totals, 0)
        after = whole - tl.cumsum(block_totals, 0)
        unread = tl.minimum(unread, tl.sum((after <= -150.0).to(tl.int32), 0))
        tl.store(segment_decay_ptr + part.to(tl.int64) * nheads + head + k, whole)
    for k in tl.static_range(HEADS):
        totals = totals + (tl.load(total_ptr + (head + k).to(tl.int64) * blocks + first_block + unread),)

    h = tl.zeros((CHANNELS, STATES), tl.float32)
    for i in range(unread, n_blocks):
        first = tl.minimum(i, n_blocks).to(tl.int64) * BLOCK
        is_token = i * BLOCK + position < n_tokens
        x = tl.load(x_ptr + first * x_stride + x_offsets, mask=is_token[:, None], other=0.0)
        B = tl.load(B_ptr + first * B_stride + B_offsets, mask=is_token[:, None] & is_state, other=0.0)
        weights = ()
        scales = ()
        next_totals = ()
        for k in tl.static_range(HEADS):
            weight_ptrs = weight_ptr + (head + k).to(tl.int64) * tokens + base + first + position
            weights = weights + (tl.load(weight_ptrs, mask=is_token, other=0.0),)
            scales = scales + (tl.exp2(totals[k]),)
            behind = first_block + tl.minimum(i + 1, n_blocks - 1)
            next_totals = next_totals + (tl.load(total_ptr + (head + k).to(tl.int64) * blocks + behind),)
        totals = next_totals
        # scaled in every iteration, which also makes the compiler wait for the product before it reuses registers
        h = h * _down(scales, channel, headdim, HEADS)
        fed = (tl.trans(x).to(tl.float32) * _across(weights, channel, headdim, HEADS)).to(x.dtype)
        h = tl.dot(fed, B, h, input_precision=PRECISION)
    state_ptrs = segment_state_ptr + (part.to(tl.int64) * nheads + head) * (headdim * d_state)
    tl.store(state_ptrs + channel[:, None] * d_state + n[None, :], h, mask=is_state)


@triton.jit
def _constants(values, constant: tl.constexpr, HEADS: tl.constexpr):
    """As many scalars as there are values."""
    same = ()
    for k in tl.static_range(HEADS):
        same = same + (values[k] * 0.0 + constant,)
    return same


@triton.jit
def _scan_blocks(
    x_ptr, B_ptr, C_ptr, D_ptr, out_ptr, dt_ptr, decay_ptr, weight_ptr, total_ptr, product_ptr, segment_state_ptr,
    head, part, base, n_tokens, first_block, n_blocks, tokens, blocks, x_stride, B_stride, C_stride, out_stride,
    nheads: tl.constexpr, headdim: tl.constexpr, ngroups: tl.constexpr, d_state: tl.constexpr, BLOCK: tl.constexpr,
    HEADS: tl.constexpr, STATES: tl.constexpr, FACTORED: tl.constexpr, MOST_DECAY: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The outputs of HEADS heads of a segment, which starts at token ``base``, block after block."""
    CHANNELS: tl.constexpr = HEADS * headdim
    group = head // (nheads // ngroups)
    channel = tl.arange(0, CHANNELS)
    n = tl.arange(0, STATES)
    position = tl.arange(0, BLOCK)
    is_state = (n < d_state)[None, :]
    # within a block 32 bits are enough
    x_ptr += base * x_stride + head * headdim
    out_ptr += base * out_stride + head * headdim
    B_ptr += base * B_stride + group * d_state
    C_ptr += base * C_stride + group * d_state
    product_ptr += (first_block.to(tl.int64) * ngroups + group) * (BLOCK * BLOCK)
    x_offsets = position[:, None] * x_stride + channel[None, :]
    out_offsets = position[:, None] * out_stride + channel[None, :]
    B_offsets = position[:, None] * B_stride + n[None, :]
    C_offsets = position[:, None] * C_stride + n[None, :]
    product_offsets = position[:, None] * BLOCK + position[None, :]
    state_ptrs = segment_state_ptr + (part.to(tl.int64) * nheads + head) * (headdim * d_state)
    h = tl.load(state_ptrs + channel[:, None] * d_state + n[None, :], mask=is_state, other=0.0)
    skips = ()
    totals = ()
    scales = ()
    for k in tl.static_range(HEADS):
        skips = skips + (tl.load(D_ptr + head + k).to(tl.float32),)
        totals = totals + (tl.load(total_ptr + (head + k).to(tl.int64) * blocks + first_block),)
        # factored: log2 of what h is to be multiplied by to be the state
        scales = scales + (totals[k] * 0.0,)
    D = skips[0] if HEADS == 1 else tl.trans(_down(skips, channel, headdim, HEADS))

    for i in range(0, n_blocks):
        here = tl.minimum(i, n_blocks).to(tl.int64)
        first = here * BLOCK
        is_token = i * BLOCK + position < n_tokens
        C = tl.load(C_ptr + first * C_stride + C_offsets, mask=is_token[:, None] & is_state, other=0.0)
        B = tl.load(B_ptr + first * B_stride + B_offsets, mask=is_token[:, None] & is_state, other=0.0)
        x = tl.load(x_ptr + first * x_stride + x_offsets, mask=is_token[:, None], other=0.0)
        S = tl.load(product_ptr + here * (ngroups * BLOCK * BLOCK) + product_offsets)
        if FACTORED:
            # rarely, since most blocks decay by little
            lowest_scale = scales[0] + totals[0]
            for k in tl.static_range(1, HEADS):
                lowest_scale = tl.minimum(lowest_scale, scales[k] + totals[k])
            if lowest_scale < -0.5 * MOST_DECAY:
                factors = ()
                for k in tl.static_range(HEADS):
                    factors = factors + (tl.exp2(0.5 * scales[k] - 0.25 * MOST_DECAY),)
                # twice: the whole factor may be too small for float32
                factor = _down(factors, channel, headdim, HEADS)
                h = h * factor * factor
                scales = _constants(scales, 0.5 * MOST_DECAY, HEADS)
        into = ()
        outof = ()
        next_scales = ()
        next_totals = ()
        for k in tl.static_range(HEADS):
            offset = (head + k).to(tl.int64) * tokens + base + first
            decay = tl.load(decay_ptr + offset + position, mask=is_token, other=0.0)
            behind = first_block + tl.minimum(i + 1, n_blocks - 1)
            next_totals = next_totals + (tl.load(total_ptr + (head + k).to(tl.int64) * blocks + behind),)
            if FACTORED:
                dt = tl.load(dt_ptr + offset + position, mask=is_token, other=0.0)
                into = into + (dt * tl.exp2(-scales[k] - decay),)
                outof = outof + (tl.exp2(scales[k] + decay),)
                next_scales = next_scales + (scales[k] + totals[k],)
            else:
                into = into + (tl.load(weight_ptr + offset + position, mask=is_token, other=0.0),)
                outof = outof + (tl.exp2(decay),)
                next_scales = next_scales + (scales[k],)
        block_decay = tl.exp2(totals[0])
        totals = next_totals
        scales = next_scales
        fed = (tl.trans(x).to(tl.float32) * _across(into, channel, headdim, HEADS)).to(x.dtype)
        y = tl.dot(h.to(C.dtype), tl.trans(C), input_precision=PRECISION)
        if FACTORED:
            y = tl.dot(fed, tl.trans(S), y, input_precision=PRECISION)
            y = y * _across(outof, channel, headdim, HEADS)
        else:
            y = y * outof[0][None, :]
            offset = head.to(tl.int64) * tokens + base + first
            dt = tl.load(dt_ptr + offset + position, mask=is_token, other=0.0)
            decay = tl.load(decay_ptr + offset + position, mask=is_token, other=0.0)
            M = S.to(tl.float32) * tl.exp2(tl.minimum(decay[:, None] - decay[None, :], 0.0))
            scaled = (tl.trans(x).to(tl.float32) * dt[None, :]).to(x.dtype)
            y = tl.dot(scaled, tl.trans(M.to(x.dtype)), y, input_precision=PRECISION)
            h = h * block_decay
        h = tl.dot(fed, B, h, input_precision=PRECISION)
        result = tl.trans(y) + x.to(tl.float32) * D
        tl.store(
            out_ptr + first * out_stride + out_offsets, result.to(out_ptr.dtype.element_ty), mask=is_token[:, None]
        )


@triton.jit(
    do_not_specialize=["nseq", "search_depth", "tokens", "blocks", "index_stride"],
    do_not_specialize_on_alignment=UNALIGNED,
)
def _ssd_scan_kernel(
    x_ptr, B_ptr, C_ptr, D_ptr, out_ptr, dt_ptr, decay_ptr, weight_ptr, total_ptr, product_ptr, segment_state_ptr,
    query_start_loc_ptr, state_indices_ptr, nseq, search_depth, tokens, blocks,
    x_stride, B_stride, C_stride, out_stride, index_stride,
    nheads: tl.constexpr, headdim: tl.constexpr, ngroups: tl.constexpr, d_state: tl.constexpr, NULL: tl.constexpr,
    BLOCK: tl.constexpr, SEGMENT: tl.constexpr, HEADS: tl.constexpr, STATES: tl.constexpr,
    FACTORED: tl.constexpr, PAIRED: tl.constexpr, MOST_DECAY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The outputs of HEADS heads of a segment.

    Both launches decide alike, for PAIRED heads together, which of them takes a segment.
    PAIRED = 0: this one takes all.
    """
    MOST_BLOCKS: tl.constexpr = SEGMENT // BLOCK
    part = tl.program_id(1)
    sequence = find_sequence(query_start_loc_ptr, part, nseq, SEGMENT, search_depth)
    start = tl.load(query_start_loc_ptr + sequence)
    in_sequence = part - start // SEGMENT - sequence
    n_tokens = tl.minimum(tl.load(query_start_loc_ptr + sequence + 1) - start - in_sequence * SEGMENT, SEGMENT)
    if tl.load(state_indices_ptr + sequence * index_stride) == NULL:
        return
    if n_tokens <= 0:
        return
    # token numbers in int64: tokens x row stride passes 2^31
    base = start.to(tl.int64) + in_sequence * SEGMENT
    first_block = start // BLOCK + sequence + in_sequence * MOST_BLOCKS
    n_blocks = (n_tokens + BLOCK - 1) // BLOCK
    head = tl.program_id(0) * HEADS
    if PAIRED > 0:
        lowest = tl.full((MOST_BLOCKS,), 0.0, tl.float32)
        block = tl.arange(0, MOST_BLOCKS)
        for k in tl.static_range(PAIRED):
            paired_head = head // PAIRED * PAIRED + k
            total_ptrs = total_ptr + paired_head.to(tl.int64) * blocks + first_block + block
            lowest = tl.minimum(lowest, tl.load(total_ptrs, mask=block < n_blocks, other=0.0))
        if (tl.min(lowest, 0) >= -MOST_DECAY) != FACTORED:
            return
    _scan_blocks(
        x_ptr, B_ptr, C_ptr, D_ptr, out_ptr, dt_ptr, decay_ptr, weight_ptr, total_ptr, product_ptr,
        segment_state_ptr, head, part, base, n_tokens, first_block, n_blocks, tokens, blocks,
        x_stride, B_stride, C_stride, out_stride, nheads, headdim, ngroups, d_state, BLOCK, HEADS, STATES,
        FACTORED, MOST_DECAY, PRECISION,
    )  # fmt: skip
