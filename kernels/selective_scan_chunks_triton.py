"""What surrounds the recurrence of selective_scan_triton: packed B and C, and the walk over chunks."""

# mypy: ignore-errors
# ruff: noqa: RUF005
# Triton's language looks like Python but has neither its types nor starred tuples, and no `and` of run-time conditions.

import triton
import triton.language as tl

from .dispatch import UNALIGNED


@triton.jit(do_not_specialize=["tokens"])
def _selective_scan_pack_kernel(
    B_ptr, C_ptr, packed_ptr, tokens, B_stride, C_stride,
    d_state: tl.constexpr, PADDED: tl.constexpr, BLOCK_STATES: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    """packed[t] = (B[t], C[t]), contiguous, each padded to PADDED states."""
    # token numbers in int64: tokens x row stride passes 2^31
    token = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    n = tl.arange(0, BLOCK_STATES)
    is_token = (token < tokens)[:, None]
    is_state = is_token & (n < d_state)[None, :]
    is_padded = is_token & (n < PADDED)[None, :]
    packed_ptrs = packed_ptr + token[:, None] * (2 * PADDED) + n[None, :]
    B = tl.load(B_ptr + token[:, None] * B_stride + n[None, :], mask=is_state, other=0.0)
    C = tl.load(C_ptr + token[:, None] * C_stride + n[None, :], mask=is_state, other=0.0)
    tl.store(packed_ptrs, B.to(packed_ptr.dtype.element_ty), mask=is_padded)
    tl.store(packed_ptrs + PADDED, C.to(packed_ptr.dtype.element_ty), mask=is_padded)


@triton.jit
def _unpack(words_ptr, d_state: tl.constexpr, PER_WORD: tl.constexpr):
    """d_state float32 scalars out of 64-bit words that hold 4 bfloat16 or 2 float32 each."""
    values = ()
    for q in tl.static_range((d_state + PER_WORD - 1) // PER_WORD):
        word = tl.load(words_ptr + q)
        low = word.to(tl.int32)
        high = (word >> 32).to(tl.int32)
        if PER_WORD == 4:
            # the upper half of a float32 is a bfloat16
            values = values + (
                (low << 16).to(tl.float32, bitcast=True),
                (low & -65536).to(tl.float32, bitcast=True),
                (high << 16).to(tl.float32, bitcast=True),
                (high & -65536).to(tl.float32, bitcast=True),
            )
        else:
            values = values + (low.to(tl.float32, bitcast=True), high.to(tl.float32, bitcast=True))
    return values


@triton.jit
def _load_rows(ptrs, stride: tl.constexpr, count, T: tl.constexpr):
    """T rows of a block of channels; behind ``count`` rows the last one is repeated, nothing further is read."""
    rows = ()
    for i in tl.static_range(T):
        rows = rows + (tl.load(ptrs + tl.minimum(i, count - 1).to(tl.int64) * stride),)
    return rows


@triton.jit(do_not_specialize=["chunk_size"], do_not_specialize_on_alignment=UNALIGNED)
def _selective_scan_walk_kernel(
    A_ptr, state_ptr, chunk_state_ptr, chunk_dt_ptr,
    query_start_loc_ptr, state_indices_ptr, has_initial_state_ptr, chunk_size, state_stride,
    d_inner: tl.constexpr, d_state: tl.constexpr, NULL: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr, STATES: tl.constexpr, AHEAD: tl.constexpr, launch_pdl: tl.constexpr,
):  # fmt: skip
    """Replace what each chunk adds by the state that it starts from, chunk after chunk. In place in chunk_state.

    launch_pdl: see `_selective_scan_kernel`.
    """
    if launch_pdl:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    sequence = tl.program_id(2)
    start = tl.load(query_start_loc_ptr + sequence)
    n_tokens = tl.load(query_start_loc_ptr + sequence + 1) - start
    slot = tl.load(state_indices_ptr + sequence).to(tl.int64)
    if slot == NULL:
        return
    channel = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    # chunk numbers in int64: chunks x states passes 2^31
    first = (start // chunk_size + sequence).to(tl.int64)
    chunks = (n_tokens + chunk_size - 1) // chunk_size
    dt_ptrs = chunk_dt_ptr + first * d_inner + channel
    is_initial = tl.load(has_initial_state_ptr + sequence) != 0
    # a thread walks over STATES states of a channel, which share dt
    A = ()
    h = ()
    state_ptrs = ()
    ends = ()
    for k in tl.static_range(STATES):
        n = tl.program_id(1) * STATES + k
        end = tl.where(n < d_state, d_inner, 0)
        A = A + (tl.load(A_ptr + channel * d_state + n, mask=channel < end, other=0.0) * 1.4426950408889634,)
        h_n = tl.load(state_ptr + slot * state_stride + channel * d_state + n, mask=channel < end, other=0.0)
        h = h + (tl.where(is_initial, h_n.to(tl.float32), 0.0),)
        state_ptrs = state_ptrs + (chunk_state_ptr + first * (d_inner * d_state) + n * d_inner + channel,)
        ends = ends + (end,)
    for chunk in range(0, chunks, AHEAD):
        # what AHEAD chunks add is loaded at once, since only the sums depend on each other
        added = ()
        dts = ()
        for i in tl.static_range(AHEAD):
            row = tl.minimum(chunk + i, chunks).to(tl.int64)
            # nothing was written for the last chunk
            is_written = row < chunks - 1
            dts = dts + (tl.load(dt_ptrs + row * d_inner, mask=channel < tl.where(is_written, d_inner, 0), other=0.0),)
            for k in tl.static_range(STATES):
                mask = channel < tl.where(is_written, ends[k], 0)
                added = added + (tl.load(state_ptrs[k] + row * (d_inner * d_state), mask=mask, other=0.0),)
        for i in tl.static_range(AHEAD):
            row = tl.minimum(chunk + i, chunks).to(tl.int64)
            new_h = ()
            for k in tl.static_range(STATES):
                mask = channel < tl.where(row < chunks, ends[k], 0)
                tl.store(state_ptrs[k] + row * (d_inner * d_state), h[k], mask=mask)
                new_h = new_h + (h[k] * tl.exp2(dts[i] * A[k]) + added[i * STATES + k],)
            h = new_h
