"""The small kernels of ssd: what each block needs, and the walk over segments.

A sequence is cut into segments of SEGMENT tokens and these into blocks of BLOCK tokens. Segments and blocks are
numbered as in `find_sequence`, so that the host needs only shapes.
"""

# mypy: ignore-errors
# ruff: noqa: RUF005
# Triton's language looks like Python but has neither its types nor starred tuples.

import triton
import triton.language as tl

from .dispatch import UNALIGNED
from .triton_helpers import filtered_dt, find_sequence


@triton.jit(
    do_not_specialize=["nseq", "search_depth", "tokens", "blocks", "index_stride"],
    do_not_specialize_on_alignment=UNALIGNED,
)
def _ssd_prepare_kernel(
    raw_dt_ptr, A_ptr, dt_bias_ptr, B_ptr, C_ptr, dt_ptr, decay_ptr, weight_ptr, total_ptr, product_ptr,
    query_start_loc_ptr, state_indices_ptr, dt_threshold_ptr, seq_rows_ptr, seq_prompt_tokens_ptr,
    nseq, search_depth, tokens, blocks, raw_dt_stride, B_stride, C_stride, index_stride,
    nheads: tl.constexpr, ngroups: tl.constexpr, d_state: tl.constexpr, NULL: tl.constexpr, FILTER: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_HEADS: tl.constexpr, STATES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Of one block: C B^T of a group, or dt of some heads.

    product: C B^T, 0 where j > i or behind the end: (blocks, ngroups, BLOCK, BLOCK).
    dt: softplus(raw_dt + dt_bias), 0 where filtered; decay: the running sum of dt x A x log2(e); weight: a token's in
    the state behind the block, dt x 2^(the decay of the tokens behind it); each (nheads, tokens).
    total: the decay over the whole block: (nheads, blocks).
    """
    part = tl.program_id(0)
    sequence = find_sequence(query_start_loc_ptr, part, nseq, BLOCK, search_depth)
    start = tl.load(query_start_loc_ptr + sequence)
    first = (part - start // BLOCK - sequence) * BLOCK
    n_tokens = tl.load(query_start_loc_ptr + sequence + 1) - start
    if tl.load(state_indices_ptr + sequence * index_stride) == NULL:
        return
    if first >= n_tokens:
        return
    position = first + tl.arange(0, BLOCK)
    # token numbers in int64: tokens x row stride passes 2^31
    token = start.to(tl.int64) + position

    if tl.program_id(1) < ngroups:
        group = tl.program_id(1)
        n = tl.arange(0, STATES)
        is_state = (position < n_tokens)[:, None] & (n < d_state)[None, :]
        C = tl.load(C_ptr + token[:, None] * C_stride + group * d_state + n[None, :], mask=is_state, other=0.0)
        B = tl.load(B_ptr + token[:, None] * B_stride + group * d_state + n[None, :], mask=is_state, other=0.0)
        product = tl.dot(C, tl.trans(B), input_precision=PRECISION)
        product = tl.where(position[:, None] >= position[None, :], product, 0.0)
        i = tl.arange(0, BLOCK)
        product_ptr += (part.to(tl.int64) * ngroups + group) * (BLOCK * BLOCK)
        tl.store(product_ptr + i[:, None] * BLOCK + i[None, :], product.to(product_ptr.dtype.element_ty))
        return

    head = (tl.program_id(1) - ngroups) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    is_head = head < nheads
    mask = (position < n_tokens)[:, None] & is_head[None, :]
    raw_dt = tl.load(raw_dt_ptr + token[:, None] * raw_dt_stride + head[None, :], mask=mask, other=0.0)
    dt_bias = tl.load(dt_bias_ptr + head, mask=is_head, other=0.0).to(tl.float32)
    A = tl.load(A_ptr + head, mask=is_head, other=0.0).to(tl.float32) * 1.4426950408889634
    threshold = dt_bias
    is_prompt = position < n_tokens
    if FILTER:
        row = tl.load(seq_rows_ptr + sequence).to(tl.int64)
        threshold = tl.load(dt_threshold_ptr + row * nheads + head, mask=is_head, other=-1.0)
        is_prompt = position < tl.load(seq_prompt_tokens_ptr + sequence)
    dt = filtered_dt(raw_dt, dt_bias[None, :], threshold[None, :], is_prompt[:, None], FILTER)
    dt = tl.where(mask, dt, 0.0)
    decays = dt * A[None, :]
    # added up from behind: total - decay would lose what is small beside both
    behind = tl.cumsum(decays, 0, reverse=True) - decays
    offsets = head.to(tl.int64)[None, :] * tokens + token[:, None]
    tl.store(dt_ptr + offsets, dt, mask=mask)
    tl.store(decay_ptr + offsets, tl.cumsum(decays, 0), mask=mask)
    tl.store(weight_ptr + offsets, dt * tl.exp2(behind), mask=mask)
    tl.store(total_ptr + head.to(tl.int64) * blocks + part, tl.sum(decays, 0), mask=is_head)


@triton.jit(do_not_specialize=["index_stride"], do_not_specialize_on_alignment=UNALIGNED)
def _ssd_walk_kernel(
    state_ptr, segment_state_ptr, segment_decay_ptr, query_start_loc_ptr, state_indices_ptr,
    has_initial_state_ptr, state_stride, index_stride,
    nheads: tl.constexpr, size: tl.constexpr, NULL: tl.constexpr, SEGMENT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Replace what each segment adds by the state that it starts from, and write the last state.

    size: numbers in the state of a head.
    """
    head = tl.program_id(1)
    sequence = tl.program_id(2)
    slot = tl.load(state_indices_ptr + sequence * index_stride).to(tl.int64)
    if slot == NULL:
        return
    own = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    is_own = own < size
    offsets = head * size + own
    is_initial = tl.load(has_initial_state_ptr + sequence) != 0
    h = tl.load(state_ptr + slot * state_stride + offsets, mask=own < tl.where(is_initial, size, 0), other=0.0)
    h = h.to(tl.float32)
    start = tl.load(query_start_loc_ptr + sequence)
    n_tokens = tl.load(query_start_loc_ptr + sequence + 1) - start
    # segment numbers in int64: segments x states passes 2^31
    first = (start // SEGMENT + sequence).to(tl.int64)
    segments = (n_tokens + SEGMENT - 1) // SEGMENT
    for segment in range(0, segments, AHEAD):
        # what AHEAD segments add is loaded at once, since only the sums depend on each other
        added = ()
        decays = ()
        for i in tl.static_range(AHEAD):
            row = first + tl.minimum(segment + i, segments - 1)
            decays = decays + (tl.load(segment_decay_ptr + row * nheads + head),)
            added = added + (tl.load(segment_state_ptr + row * (nheads * size) + offsets, mask=is_own, other=0.0),)
        for i in tl.static_range(AHEAD):
            state_ptrs = segment_state_ptr + (first + segment + i) * (nheads * size) + offsets
            tl.store(state_ptrs, h, mask=own < tl.where(segment + i < segments, size, 0))
            h = tl.where(segment + i < segments, h * tl.exp2(decays[i]) + added[i], h)
    is_changed = own < tl.where(n_tokens > 0, size, 0)
    tl.store(state_ptr + slot * state_stride + offsets, h.to(state_ptr.dtype.element_ty), mask=is_changed)
