"""Triton kernels of the filtered selective scan; imported by the wrapper only where Triton can run.

A thread holds whole channels with all their states in registers, so that nothing is exchanged between threads. To fill
the GPU, sequences are cut into chunks: ``_selective_scan_kernel`` computes what each chunk adds to the state,
``_selective_scan_walk_kernel`` walks over the chunks, and ``_selective_scan_kernel`` runs again from each chunk's true
initial state and writes the outputs. The decay of a whole chunk is ``exp(A * sum(dt))``. Small batches take one run
over whole sequences.
"""

# mypy: ignore-errors
# ruff: noqa: RUF005, SIM102
# Triton's language looks like Python but has neither its types nor starred tuples, and no `and` of run-time conditions.

import torch
import triton
import triton.language as tl

from .dispatch import UNALIGNED, is_nvidia, supports_dependent_launch
from .launch import launch
from .launch_sizes import cdiv, next_power_of_2
from .reference import NULL_SLOT
from .selective_scan_chunks_triton import _load_rows, _selective_scan_pack_kernel, _selective_scan_walk_kernel, _unpack
from .triton_helpers import filtered_dt, find_sequence, silu

# Launch sizes, measured on an H200 (benchmarks/notes.md): one warp has 64 channels, 2 a thread; 128 registers a thread
# let 16 warps share a multiprocessor, and 4 tokens are loaded ahead.
BLOCK_CHANNELS = 64
NUM_WARPS = 1
MAX_REGISTERS = 128
GROUP = 4
# states whose exponential is a polynomial, in the run that only adds up a chunk's state: it has issue slots to spare
POLYNOMIALS = 2
# the walk over chunks: states of a channel that a thread takes, and chunks that it loads ahead
WALK_STATES = 2
WALK_AHEAD = 16
# chunks: long enough to spread their cost, short enough that 132 multiprocessors are evenly filled
PROGRAMS_WANTED = 4096
SMALLEST_CHUNK = 64
LARGEST_CHUNK = 256


@triton.jit
def _exp2_polynomial(dt, A):
    """``exp2(dt * A)`` for A <= 0 to 3e-7 on the FMA units, which the special-function unit leaves idle."""
    v = tl.maximum(dt * A, -126.0)
    # adding 1.5 * 2^23 leaves the nearest integer in the low bits
    shifted = v + 12582912.0
    f = v - (shifted - 12582912.0)
    p = f * 0.0013400577 + 0.009618129
    p = p * f + 0.05550339
    p = p * f + 0.24022651
    p = p * f + 0.6931472
    p = p * f + 1.0
    return ((shifted.to(tl.int32, bitcast=True) << 23) + p.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def _token(h, dt, x, z, words_ptr, A, D, d_state: tl.constexpr, PER_WORD: tl.constexpr, PADDED: tl.constexpr,
           HAS_Z: tl.constexpr, EMIT: tl.constexpr, POLYNOMIALS: tl.constexpr):  # fmt: skip
    """One token of the recurrence for a block of channels. h, A: d_state tensors each. Returns h and the output."""
    x = x.to(tl.float32)
    feed = dt * x
    y = x * D
    B = _unpack(words_ptr, d_state, PER_WORD)
    if EMIT:
        C = _unpack(words_ptr + PADDED // PER_WORD, d_state, PER_WORD)
    new_h = ()
    for n in tl.static_range(d_state):
        if n < POLYNOMIALS:
            h_n = h[n] * _exp2_polynomial(dt, A[n]) + feed * B[n]
        else:
            h_n = h[n] * tl.exp2(dt * A[n]) + feed * B[n]
        new_h = new_h + (h_n,)
        if EMIT:
            y += h_n * C[n]
    if HAS_Z and EMIT:
        y *= silu(z.to(tl.float32))
    return new_h, y


@triton.jit(do_not_specialize=["nseq", "chunk_size", "search_depth"], do_not_specialize_on_alignment=UNALIGNED)
def _selective_scan_kernel(
    x_ptr, dt_ptr, A_ptr, D_ptr, z_ptr, dt_bias_ptr, out_ptr, packed_ptr, state_ptr, chunk_state_ptr, chunk_dt_ptr,
    query_start_loc_ptr, state_indices_ptr, has_initial_state_ptr,
    dt_threshold_ptr, seq_rows_ptr, seq_prompt_tokens_ptr, nseq, chunk_size, search_depth, state_stride,
    x_stride: tl.constexpr, dt_stride: tl.constexpr, z_stride: tl.constexpr, out_stride: tl.constexpr,
    word_stride: tl.constexpr, d_inner: tl.constexpr, d_state: tl.constexpr, PADDED: tl.constexpr,
    PER_WORD: tl.constexpr, NULL: tl.constexpr,
    HAS_Z: tl.constexpr, FILTER: tl.constexpr, IS_CHUNK: tl.constexpr, EMIT: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr, T: tl.constexpr, POLYNOMIALS: tl.constexpr, launch_pdl: tl.constexpr,
):  # fmt: skip
    """A block of channels of a sequence or of a chunk. EMIT: its outputs; otherwise what it adds to the state.

    launch_pdl: the kernel may start while the one in front of it ends (programmatic dependent
    launch); a run that follows the walk over chunks waits for it as late as it can.
    """
    part = tl.program_id(1)
    FOLLOWS_WALK: tl.constexpr = IS_CHUNK and EMIT
    if launch_pdl and not FOLLOWS_WALK:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    sequence = part
    if IS_CHUNK:
        sequence = find_sequence(query_start_loc_ptr, part, nseq, chunk_size, search_depth)
    sequence_start = tl.load(query_start_loc_ptr + sequence)
    sequence_end = tl.load(query_start_loc_ptr + sequence + 1)
    start = sequence_start
    end = sequence_end
    if IS_CHUNK:
        start += (part - sequence_start // chunk_size - sequence) * chunk_size
        end = tl.minimum(sequence_end, start + chunk_size)
    slot = tl.load(state_indices_ptr + sequence).to(tl.int64)
    if slot == NULL:
        return
    if start >= end:
        return
    if not EMIT:
        # a sequence's last chunk passes its state on to nobody
        if end == sequence_end:
            return

    n_tokens = end - start
    own = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    is_channel = own < d_inner
    channel = own
    if d_inner % BLOCK_CHANNELS != 0:
        # surplus channels repeat the last one, so that no load needs a mask; they are never stored
        channel = tl.minimum(own, d_inner - 1)
    D = tl.load(D_ptr + channel).to(tl.float32)
    dt_bias = tl.load(dt_bias_ptr + channel).to(tl.float32)
    threshold = dt_bias
    prompt_end = 0
    if FILTER:
        row = tl.load(seq_rows_ptr + sequence).to(tl.int64)
        threshold = tl.load(dt_threshold_ptr + row * d_inner + channel)
        prompt_end = sequence_start + tl.load(seq_prompt_tokens_ptr + sequence) - start
    state_ptrs = state_ptr + slot * state_stride + channel * d_state
    chunk_state_ptrs = chunk_state_ptr + part.to(tl.int64) * (d_inner * d_state) + channel
    is_initial = tl.load(has_initial_state_ptr + sequence) != 0
    A = ()
    for n in tl.static_range(d_state):
        # exp(dt A) = exp2(dt A log2(e))
        A = A + (tl.load(A_ptr + channel * d_state + n) * 1.4426950408889634,)

    # token offsets in int64: tokens x row stride passes 2^31
    base = start.to(tl.int64)
    x_ptrs = x_ptr + base * x_stride + channel
    dt_ptrs = dt_ptr + base * dt_stride + channel
    z_ptrs = z_ptr + base * z_stride + channel
    out_ptrs = out_ptr + base * out_stride + channel
    words_ptr = packed_ptr + base * word_stride
    dt_sum = tl.full((BLOCK_CHANNELS,), 0.0, tl.float32)

    # the rows of the next T tokens are loaded while these T are computed
    x_rows = _load_rows(x_ptrs, x_stride, n_tokens, T)
    dt_rows = _load_rows(dt_ptrs, dt_stride, n_tokens, T)
    z_rows = x_rows
    if EMIT and HAS_Z:
        z_rows = _load_rows(z_ptrs, z_stride, n_tokens, T)
    if launch_pdl and FOLLOWS_WALK:
        tl.extra.cuda.gdc_wait()
    h = ()
    for n in tl.static_range(d_state):
        if not IS_CHUNK:
            h = h + (tl.where(is_initial, tl.load(state_ptrs + n).to(tl.float32), 0.0),)
        elif EMIT:
            h = h + (tl.load(chunk_state_ptrs + n * d_inner),)
        else:
            h = h + (tl.full((BLOCK_CHANNELS,), 0.0, tl.float32),)
    whole = n_tokens // T * T
    for first in range(0, whole, T):
        # the last group loads rows again that nobody uses, rather than rows behind the end
        ahead = tl.minimum(first + T, n_tokens - T).to(tl.int64)
        here = tl.minimum(first, whole).to(tl.int64)
        next_x = _load_rows(x_ptrs + ahead * x_stride, x_stride, T, T)
        next_dt = _load_rows(dt_ptrs + ahead * dt_stride, dt_stride, T, T)
        next_z = next_x
        if EMIT and HAS_Z:
            next_z = _load_rows(z_ptrs + ahead * z_stride, z_stride, T, T)
        for i in tl.static_range(T):
            dt = filtered_dt(dt_rows[i], dt_bias, threshold, first + i < prompt_end, FILTER)
            words = words_ptr + (here + i) * word_stride
            h, y = _token(h, dt, x_rows[i], z_rows[i], words, A, D, d_state, PER_WORD, PADDED, HAS_Z, EMIT, POLYNOMIALS)
            dt_sum += dt
            if EMIT:
                tl.store(out_ptrs + (here + i) * out_stride, y.to(out_ptr.dtype.element_ty), mask=is_channel)
        x_rows = next_x
        dt_rows = next_dt
        z_rows = next_z
    for t in range(whole, n_tokens):
        here = tl.minimum(t, n_tokens).to(tl.int64)
        dt = filtered_dt(tl.load(dt_ptrs + here * dt_stride), dt_bias, threshold, here < prompt_end, FILTER)
        x = tl.load(x_ptrs + here * x_stride)
        z = x
        if EMIT and HAS_Z:
            z = tl.load(z_ptrs + here * z_stride)
        words = words_ptr + here * word_stride
        h, y = _token(h, dt, x, z, words, A, D, d_state, PER_WORD, PADDED, HAS_Z, EMIT, POLYNOMIALS)
        dt_sum += dt
        if EMIT:
            tl.store(out_ptrs + here * out_stride, y.to(out_ptr.dtype.element_ty), mask=is_channel)

    if EMIT:
        if end == sequence_end:
            for n in tl.static_range(d_state):
                tl.store(state_ptrs + n, h[n].to(state_ptr.dtype.element_ty), mask=is_channel)
    else:
        for n in tl.static_range(d_state):
            tl.store(chunk_state_ptrs + n * d_inner, h[n], mask=is_channel)
        tl.store(chunk_dt_ptr + part.to(tl.int64) * d_inner + channel, dt_sum, mask=is_channel)


def _pack(B: torch.Tensor, C: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """64-bit words that hold B and then C of each token, how many numbers a word holds, and the padded d_state."""
    tokens, d_state = B.shape
    is_bf16 = B.dtype == C.dtype == torch.bfloat16
    is_same_tensor = C.untyped_storage().data_ptr() == B.untyped_storage().data_ptr() and C.stride(0) == B.stride(0)
    follows = is_same_tensor and C.storage_offset() == B.storage_offset() + d_state
    if is_bf16 and follows and d_state % 4 == 0 and B.stride(0) % 4 == 0 and B.data_ptr() % 8 == 0:
        # slices of one projection
        return B.view(torch.int64), 4, d_state
    padded = cdiv(d_state, 4) * 4
    packed = torch.empty((tokens, 2 * padded), dtype=torch.bfloat16 if is_bf16 else torch.float32, device=B.device)
    launch(_selective_scan_pack_kernel, (cdiv(tokens, 64),), B)(
        B, C, packed, tokens, B.stride(0), C.stride(0),
        d_state=d_state, PADDED=padded, BLOCK_STATES=next_power_of_2(padded), BLOCK_TOKENS=64, num_warps=4,
    )  # fmt: skip
    return packed.view(torch.int64), 4 if is_bf16 else 2, padded


def _chunk_size(tokens: int, d_inner: int) -> int:
    """Tokens a chunk; 0 for whole sequences, where none can be long."""
    if tokens <= SMALLEST_CHUNK:
        return 0
    wanted = next_power_of_2(tokens * cdiv(d_inner, BLOCK_CHANNELS) // PROGRAMS_WANTED)
    return min(max(wanted, SMALLEST_CHUNK), LARGEST_CHUNK)


def selective_scan_triton(
    x, dt, A, B, C, D, z, dt_bias, state, query_start_loc, state_indices, has_initial_state,
    dt_threshold, seq_rows, seq_prompt_tokens, out, chunk=None,
) -> None:  # fmt: skip
    """Launch for checked arguments; see :func:`kernels.selective_scan.selective_scan`.

    Args:
        chunk: tokens a chunk, a power of two; 0 for whole sequences, None to choose.
    """
    (tokens, d_inner), d_state, nseq = x.shape, A.shape[1], state_indices.shape[0]
    words, per_word, padded = _pack(B, C)
    blocks = cdiv(d_inner, BLOCK_CHANNELS)
    chunk = _chunk_size(tokens, d_inner) if chunk is None else chunk
    parts = tokens // chunk + nseq if chunk else nseq
    kept = parts if chunk else 0
    chunk_state = torch.empty((kept, d_state, d_inner), dtype=torch.float32, device=x.device)
    chunk_dt = torch.empty((kept, d_inner), dtype=torch.float32, device=x.device)
    has_initial_state = has_initial_state.view(torch.uint8)
    launch_pdl = supports_dependent_launch(x.device)
    # an NVIDIA compiler option
    limits = {"maxnreg": MAX_REGISTERS} if is_nvidia(x.device) else {}
    # an unused pointer argument still needs a tensor
    gate = x if z is None else z
    filters = (
        (A, query_start_loc, query_start_loc) if dt_threshold is None else (dt_threshold, seq_rows, seq_prompt_tokens)
    )

    def scan(emit: bool) -> None:
        launch(_selective_scan_kernel, (blocks, parts), x)(
            x, dt, A, D, gate, dt_bias, out, words, state, chunk_state, chunk_dt,
            query_start_loc, state_indices, has_initial_state, *filters,
            nseq, chunk, (nseq - 1).bit_length(), state.stride(0),
            x_stride=x.stride(0), dt_stride=dt.stride(0), z_stride=gate.stride(0), out_stride=out.stride(0),
            word_stride=words.stride(0), d_inner=d_inner, d_state=d_state, PADDED=padded, PER_WORD=per_word,
            NULL=NULL_SLOT,
            HAS_Z=z is not None, FILTER=dt_threshold is not None, IS_CHUNK=chunk > 0, EMIT=emit,
            BLOCK_CHANNELS=BLOCK_CHANNELS, T=GROUP, POLYNOMIALS=0 if emit else POLYNOMIALS,
            launch_pdl=launch_pdl, num_warps=NUM_WARPS, **limits,
        )  # fmt: skip

    if chunk:
        scan(emit=False)
        grid = (cdiv(d_inner, 128), cdiv(d_state, WALK_STATES), nseq)
        launch(_selective_scan_walk_kernel, grid, x)(
            A, state, chunk_state, chunk_dt, query_start_loc, state_indices, has_initial_state, chunk,
            state.stride(0), d_inner=d_inner, d_state=d_state, NULL=NULL_SLOT,
            BLOCK_CHANNELS=128, STATES=WALK_STATES, AHEAD=WALK_AHEAD, launch_pdl=launch_pdl, num_warps=4,
        )  # fmt: skip
    scan(emit=True)
