"""Triton kernel of :mod:`kernels.selective_state_update`; imported by the wrapper only where Triton can run."""

# mypy: ignore-errors
# Triton's language looks like Python but does not have its types.

import triton
import triton.language as tl

from .dispatch import UNALIGNED, supports_dependent_launch
from .launch import launch
from .launch_sizes import cdiv, next_power_of_2
from .reference import NULL_SLOT
from .triton_helpers import filtered_dt, silu


@triton.jit(do_not_specialize=["index_stride"], do_not_specialize_on_alignment=UNALIGNED)
def _selective_state_update_kernel(
    state_ptr, x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, dt_bias_ptr, out_ptr,
    state_indices_ptr, dt_threshold_ptr, token_rows_ptr, dt_weight_ptr,
    slot_stride, x_stride, dt_stride, B_stride, C_stride, z_stride, out_stride, index_stride,
    nheads: tl.constexpr, headdim: tl.constexpr, ngroups: tl.constexpr, d_state: tl.constexpr, NULL: tl.constexpr,
    PER_HEAD: tl.constexpr, HAS_Z: tl.constexpr, FILTER: tl.constexpr,
    DT_RANK: tl.constexpr, BLOCK_RANK: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr, BLOCK_STATES: tl.constexpr, launch_pdl: tl.constexpr,
):  # fmt: skip
    """One sequence and a block of channels of one head; Mamba-1 has a single head. PER_HEAD: A, D and dt are its.
    DT_RANK > 0: dt is projected here.

    launch_pdl: the kernel may start before the one in front of it ends (programmatic dependent launch). What it reads
    until it waits was written long before: slot and row, weights, thresholds.
    """
    head = tl.program_id(1)
    # rows and slots in int64: slots x stride passes 2^31
    b = tl.program_id(2).to(tl.int64)
    slot = tl.load(state_indices_ptr + b * index_stride).to(tl.int64)
    within = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    is_channel = within < headdim
    channel = head * headdim + within
    n = tl.arange(0, BLOCK_STATES)
    is_state = n < d_state
    is_own = is_channel[:, None] & (n < tl.where(slot != NULL, d_state, 0))[None, :]
    state_ptrs = state_ptr + slot * slot_stride + channel[:, None] * d_state + n[None, :]
    row = 0
    if FILTER:
        row = tl.load(token_rows_ptr + b).to(tl.int64)
    if PER_HEAD:
        A = tl.load(A_ptr + head) * 1.4426950408889634
        D = tl.load(D_ptr + head).to(tl.float32)
        dt_bias = tl.load(dt_bias_ptr + head).to(tl.float32)
        threshold = dt_bias
        if FILTER:
            threshold = tl.load(dt_threshold_ptr + row * nheads + head)
    else:
        A_ptrs = A_ptr + channel[:, None] * d_state + n[None, :]
        A = tl.load(A_ptrs, mask=is_channel[:, None] & is_state[None, :], other=0.0) * 1.4426950408889634
        D = tl.load(D_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)
        dt_bias = tl.load(dt_bias_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)
        threshold = dt_bias
        if FILTER:
            # row 0 filters nothing: it is not even read
            is_filtered_channel = within < tl.where(row > 0, headdim, 0)
            threshold = tl.load(dt_threshold_ptr + row * headdim + channel, mask=is_filtered_channel, other=-1.0)
    rank = tl.arange(0, BLOCK_RANK)
    if DT_RANK > 0:
        weight_ptrs = dt_weight_ptr + channel[:, None] * DT_RANK + rank[None, :]
        dt_weight = tl.load(weight_ptrs, mask=is_channel[:, None] & (rank < DT_RANK)[None, :], other=0.0)
    if launch_pdl:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()

    # Read in front of the wait, the state takes a whole model's step 1 to 3 % longer.
    h = tl.load(state_ptrs, mask=is_own, other=0.0).to(tl.float32)
    group = head * ngroups // nheads
    B = tl.load(B_ptr + b * B_stride + group * d_state + n, mask=is_state, other=0.0).to(tl.float32)
    C = tl.load(C_ptr + b * C_stride + group * d_state + n, mask=is_state, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + b * x_stride + channel, mask=is_channel, other=0.0).to(tl.float32)
    if PER_HEAD:
        dt = filtered_dt(tl.load(dt_ptr + b * dt_stride + head), dt_bias, threshold, row > 0, FILTER)
        h = h * tl.exp2(dt * A) + (dt * x)[:, None] * B[None, :]
    else:
        if DT_RANK > 0:
            low_rank_dt = tl.load(dt_ptr + b * dt_stride + rank, mask=rank < DT_RANK, other=0.0)
            raw_dt = tl.sum(dt_weight.to(tl.float32) * low_rank_dt.to(tl.float32)[None, :], 1)
        else:
            raw_dt = tl.load(dt_ptr + b * dt_stride + channel, mask=is_channel, other=0.0)
        dt = filtered_dt(raw_dt, dt_bias, threshold, row > 0, FILTER)
        h = h * tl.exp2(dt[:, None] * A) + (dt * x)[:, None] * B[None, :]
    tl.store(state_ptrs, h.to(state_ptr.dtype.element_ty), mask=is_own)
    y = tl.sum(h * C[None, :], 1) + D * x
    if HAS_Z:
        y *= silu(tl.load(z_ptr + b * z_stride + channel, mask=is_channel, other=0.0).to(tl.float32))
    tl.store(out_ptr + b * out_stride + channel, y.to(out_ptr.dtype.element_ty), mask=is_channel)


# By bytes of a number of the state and d_state: up to how many channels of the batch, and then (channels a program,
# warps). Measured on an H200 within whole models, as benchmarks/decode_sizes.py does; (4, 16) and (4, 64) alone.
LAUNCH_SIZES = {
    (2, 16): ((4096, (64, 8)), (32768, (128, 8)), (4194304, (128, 4))),
    (2, 64): ((4096, (32, 8)), (2097152, (64, 4))),
    (2, 128): ((4096, (32, 8)), (16384, (16, 8)), (65536, (32, 8)), (2097152, (64, 8))),
    (4, 16): (
        (16384, (64, 8)), (32768, (128, 8)), (65536, (64, 8)), (131072, (128, 1)), (524288, (64, 4)),
        (1048576, (128, 8)), (4194304, (64, 1)),
    ),
    (4, 64): ((65536, (64, 8)), (262144, (32, 1)), (2097152, (16, 1))),
    (4, 128): ((65536, (16, 8)), (1048576, (8, 1)), (2097152, (16, 1))),
}  # fmt: skip
# the same where dt is projected, which is for a few sequences
PROJECTION_SIZES = (16, 2)


def _launch_sizes(batch: int, d_inner: int, headdim: int, d_state: int, itemsize: int) -> tuple[int, int]:
    """(channels a program, warps) of LAUNCH_SIZES; elsewhere a warp has 1024 numbers of the state."""
    padded = next_power_of_2(d_state)
    channels, warps = max(1024 // padded, 1), 1
    for most, sizes in LAUNCH_SIZES.get((itemsize, padded), ()):
        channels, warps = sizes
        if batch * d_inner <= most:
            break
    return min(channels, next_power_of_2(headdim)), warps


def selective_state_update_triton(
    state, x, dt, A, B, C, D, z, dt_bias, state_indices, dt_threshold, token_rows, out, dt_weight=None
) -> None:
    """Launch for checked arguments; see :func:`kernels.selective_state_update.selective_state_update`."""
    (batch, d_inner), d_state = x.shape, state.shape[2]
    nheads = 1 if A.dim() == 2 else A.shape[0]
    headdim = d_inner // nheads
    channels, warps = PROJECTION_SIZES
    if dt_weight is None:
        channels, warps = _launch_sizes(batch, d_inner, headdim, d_state, state.element_size())
    # an unused pointer argument still needs a tensor
    gate = x if z is None else z
    filters = (A, state_indices) if dt_threshold is None else (dt_threshold, token_rows)
    rank = 0 if dt_weight is None else dt.shape[1]
    launch(_selective_state_update_kernel, (cdiv(headdim, channels), nheads, batch), x)(
        state, x, dt, A, B, C, D, gate, dt_bias, out, state_indices, *filters, x if dt_weight is None else dt_weight,
        state.stride(0), x.stride(0), dt.stride(0), B.stride(0), C.stride(0), gate.stride(0), out.stride(0),
        state_indices.stride(0),
        nheads=nheads, headdim=headdim, ngroups=B.shape[1] // d_state, d_state=d_state, NULL=NULL_SLOT,
        PER_HEAD=A.dim() == 1, HAS_Z=z is not None, FILTER=dt_threshold is not None,
        DT_RANK=rank, BLOCK_RANK=next_power_of_2(max(rank, 1)),
        BLOCK_CHANNELS=channels, BLOCK_STATES=next_power_of_2(d_state), num_warps=warps,
        launch_pdl=supports_dependent_launch(x.device),
    )  # fmt: skip
