"""The kernel of ssd that finds the state at one position inside each sequence, a checkpoint."""

# mypy: ignore-errors
# Triton's language looks like Python but does not have its types.

import triton
import triton.language as tl

from .dispatch import UNALIGNED


@triton.jit
def _add_block(h, x_ptrs, B_ptrs, weight, decay, is_token, is_state, PRECISION: tl.constexpr):
    """The state (headdim, d_state) behind a block: h decayed, and each token times its weight."""
    x = tl.load(x_ptrs, mask=is_token[:, None], other=0.0)
    B = tl.load(B_ptrs, mask=is_token[:, None] & is_state, other=0.0)
    # in front of the rest, so that the compiler waits for the last product before it reuses registers
    h = h * tl.exp2(decay)
    fed = (tl.trans(x).to(tl.float32) * weight[None, :]).to(x.dtype)
    return tl.dot(fed, B, h, input_precision=PRECISION)


@triton.jit(do_not_specialize=["tokens", "blocks", "index_stride"], do_not_specialize_on_alignment=UNALIGNED)
def _ssd_checkpoint_kernel(
    x_ptr, A_ptr, B_ptr, dt_ptr, weight_ptr, total_ptr, segment_state_ptr, checkpoint_state_ptr,
    query_start_loc_ptr, state_indices_ptr, checkpoints_ptr, tokens, blocks, x_stride, B_stride, index_stride,
    nheads: tl.constexpr, headdim: tl.constexpr, ngroups: tl.constexpr, d_state: tl.constexpr, NULL: tl.constexpr,
    BLOCK: tl.constexpr, SEGMENT: tl.constexpr, STATES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state of a head of a sequence behind its first ``checkpoints[sequence]`` tokens.

    It goes from the state at the start of the checkpoint's segment, which the walk left in segment_state, through the
    tokens between. checkpoint_state: (sequences, nheads, headdim, d_state).
    """
    head = tl.program_id(0)
    sequence = tl.program_id(1)
    start = tl.load(query_start_loc_ptr + sequence)
    n_tokens = tl.load(query_start_loc_ptr + sequence + 1) - start
    checkpoint = tl.minimum(tl.load(checkpoints_ptr + sequence), n_tokens)
    if tl.load(state_indices_ptr + sequence * index_stride) == NULL:
        return
    if checkpoint <= 0:
        return
    # there is no segment that starts where a sequence ends
    in_sequence = tl.minimum(checkpoint // SEGMENT, (n_tokens - 1) // SEGMENT)
    in_segment = checkpoint - in_sequence * SEGMENT
    whole_blocks = in_segment // BLOCK
    group = head // (nheads // ngroups)
    channel = tl.arange(0, headdim)
    n = tl.arange(0, STATES)
    position = tl.arange(0, BLOCK)
    is_state = (n < d_state)[None, :]
    # token and segment numbers in int64: tokens x row stride and segments x states pass 2^31
    base = start.to(tl.int64) + in_sequence * SEGMENT
    x_ptrs = x_ptr + base * x_stride + head * headdim + position[:, None] * x_stride + channel[None, :]
    B_ptrs = B_ptr + base * B_stride + group * d_state + position[:, None] * B_stride + n[None, :]
    of_head = head.to(tl.int64) * tokens + base + position
    total_ptr += head.to(tl.int64) * blocks + start // BLOCK + sequence + in_sequence * (SEGMENT // BLOCK)
    offsets = channel[:, None] * d_state + n[None, :]
    part = (start // SEGMENT + sequence + in_sequence).to(tl.int64)
    state_ptrs = segment_state_ptr + (part * nheads + head) * (headdim * d_state) + offsets
    h = tl.load(state_ptrs, mask=is_state, other=0.0)

    total = tl.load(total_ptr)
    for i in range(0, whole_blocks):
        first = tl.minimum(i, whole_blocks).to(tl.int64) * BLOCK
        weight = tl.load(weight_ptr + of_head + first)
        next_total = tl.load(total_ptr + tl.minimum(i + 1, whole_blocks - 1))
        is_token = first + position < in_segment
        h = _add_block(h, x_ptrs + first * x_stride, B_ptrs + first * B_stride, weight, total, is_token, is_state,
                       PRECISION)  # fmt: skip
        total = next_total

    # of the checkpoint's own block, the tokens in front of it: their weights are those of a block that ends there
    first = whole_blocks.to(tl.int64) * BLOCK
    is_token = first + position < in_segment
    dt = tl.load(dt_ptr + of_head + first, mask=is_token, other=0.0)
    decays = dt * (tl.load(A_ptr + head).to(tl.float32) * 1.4426950408889634)
    weight = dt * tl.exp2(tl.cumsum(decays, 0, reverse=True) - decays)
    h = _add_block(h, x_ptrs + first * x_stride, B_ptrs + first * B_stride, weight, tl.sum(decays, 0), is_token,
                   is_state, PRECISION)  # fmt: skip
    checkpoint_ptrs = checkpoint_state_ptr + (sequence.to(tl.int64) * nheads + head) * (headdim * d_state) + offsets
    tl.store(checkpoint_ptrs, h.to(checkpoint_state_ptr.dtype.element_ty), mask=is_state)
