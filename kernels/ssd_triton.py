"""Triton launches of :mod:`kernels.ssd`; imported by the wrapper only where Triton can run.

A sequence is cut into segments that run in parallel: ``_ssd_segment_state_kernel`` sums up what each adds to the state,
``_ssd_walk_kernel`` finds the state that each starts from, and ``_ssd_scan_kernel`` writes the outputs. Where states
inside sequences are asked for, ``_ssd_checkpoint_kernel`` finds them from those of the segments.
"""

# mypy: ignore-errors

from typing import NamedTuple

import torch

from .dispatch import is_nvidia
from .launch import launch
from .launch_sizes import cdiv, next_power_of_2
from .reference import NULL_SLOT
from .ssd_blocks_triton import _ssd_prepare_kernel, _ssd_walk_kernel
from .ssd_checkpoint_triton import _ssd_checkpoint_kernel
from .ssd_scan_triton import _ssd_scan_kernel, _ssd_segment_state_kernel

IS_HIP = torch.version.hip is not None
# log2 of the smallest decay over a block that the factored way takes: half of it to either side of 1 leaves float32's
# and bfloat16's 2^127 enough room for the values themselves
MOST_DECAY = 160.0


class Sizes(NamedTuple):
    """Launch sizes: tokens a block and a segment; heads a program, warps, stages and registers of the large kernels."""

    block: int = 32
    # 0: by the number of tokens
    segment: int = 0
    state_heads: int = 2
    state_warps: int = 8
    state_stages: int = 4
    scan_heads: int = 1
    scan_warps: int = 4
    scan_stages: int = 3
    # 0: by d_state
    scan_registers: int | None = 0
    exact_warps: int = 4
    exact_stages: int = 2
    is_factored: bool = True


# segments: long enough to spread the cost of their states, short enough to fill 132 multiprocessors evenly
PROGRAMS_WANTED = 512
SMALLEST_SEGMENT = 256
LARGEST_SEGMENT = 4096
FLOAT32_SIZES = Sizes(
    state_heads=1, state_stages=1, scan_warps=8, scan_stages=1, scan_registers=None, exact_warps=8, exact_stages=1
)


def _scan_registers(d_state: int) -> int:
    """The fewest with which little is spilled: the state takes d_state / 2 of a thread."""
    return 128 if d_state <= 64 else 184


def _heads(wanted: int, headdim: int, heads_per_group: int) -> int:
    """The largest power of two up to ``wanted``, or up to 64 channels, that divides a group's heads."""
    wanted = max(wanted, 64 // headdim)
    while heads_per_group % wanted:
        wanted //= 2
    return wanted


def _warps(wanted: int, channels: int) -> int:
    """``wanted`` for up to 64 channels, more so that a thread holds as much of the state for more of them."""
    return max(wanted, channels // 16)


def _segment(tokens: int, nheads: int) -> int:
    """Tokens a segment."""
    wanted = next_power_of_2(tokens * nheads // PROGRAMS_WANTED)
    return min(max(wanted, SMALLEST_SEGMENT), LARGEST_SEGMENT)


def ssd_triton(
    x, dt, A, B, C, D, dt_bias, state, query_start_loc, state_indices, has_initial_state,
    dt_threshold, seq_rows, seq_prompt_tokens, out, checkpoints=None, checkpoint_state=None, sizes=None,
) -> None:  # fmt: skip
    """Launch for checked arguments; see :func:`kernels.ssd.ssd`.

    Args:
        sizes: launch sizes; None to choose.
    """
    (tokens, nheads, headdim), (ngroups, d_state) = x.shape, B.shape[1:]
    sizes = (FLOAT32_SIZES if x.dtype == torch.float32 else Sizes()) if sizes is None else sizes
    block, segment = sizes.block, sizes.segment or _segment(tokens, nheads)
    nseq = state_indices.shape[0]
    parts, blocks = tokens // segment + nseq, tokens // block + nseq
    float32 = {"dtype": torch.float32, "device": x.device}
    softplus_dt, decay, weight = torch.empty((3, nheads, tokens), **float32)
    total = torch.empty((nheads, blocks), **float32)
    product = torch.empty((blocks, ngroups, block, block), dtype=x.dtype, device=x.device)
    segment_state = torch.empty((parts, nheads * headdim, d_state), **float32)
    segment_decay = torch.empty((parts, nheads), **float32)
    # an unused pointer argument still needs a tensor
    filters = (
        (dt_threshold, seq_rows, seq_prompt_tokens) if dt_threshold is not None else (A, state_indices, state_indices)
    )
    where, search = (query_start_loc, state_indices), (nseq, (nseq - 1).bit_length())
    index_stride = state_indices.stride(0)
    block_heads = min(32, next_power_of_2(nheads))
    # three products of tf32 are about as exact as float32
    precision = {"STATES": max(16, next_power_of_2(d_state)), "PRECISION": "ieee" if IS_HIP else "tf32x3"}

    launch(_ssd_prepare_kernel, (blocks, ngroups + cdiv(nheads, block_heads)), x)(
        dt, A, dt_bias, B, C, softplus_dt, decay, weight, total, product, *where, *filters, *search,
        tokens, blocks, dt.stride(0), B.stride(0), C.stride(0), index_stride,
        nheads=nheads, ngroups=ngroups, d_state=d_state, FILTER=dt_threshold is not None, NULL=NULL_SLOT, **precision,
        BLOCK=block, BLOCK_HEADS=block_heads, num_warps=4,
    )  # fmt: skip
    large = {"nheads": nheads, "headdim": headdim, "ngroups": ngroups, "d_state": d_state, **precision}
    large |= {"NULL": NULL_SLOT, "BLOCK": block, "SEGMENT": segment}
    heads = _heads(sizes.state_heads, headdim, nheads // ngroups)
    launch(_ssd_segment_state_kernel, (nheads // heads, parts), x)(
        x, B, weight, total, segment_state, segment_decay, *where,
        *search, tokens, blocks, x.stride(0), B.stride(0), index_stride,
        **large, HEADS=heads, num_warps=_warps(sizes.state_warps, heads * headdim), num_stages=sizes.state_stages,
    )  # fmt: skip
    size = headdim * d_state
    launch(_ssd_walk_kernel, (cdiv(size, 1024), nheads, nseq), x)(
        state, segment_state, segment_decay, *where, has_initial_state.view(torch.uint8),
        state.stride(0), index_stride, nheads=nheads, size=size, NULL=NULL_SLOT, SEGMENT=segment,
        BLOCK_SIZE=1024, AHEAD=4, num_warps=4,
    )  # fmt: skip
    if checkpoints is not None:
        # with one head a program, as in the exact way
        launch(_ssd_checkpoint_kernel, (nheads, nseq), x)(
            x, A, B, softplus_dt, weight, total, segment_state, checkpoint_state, *where, checkpoints,
            tokens, blocks, x.stride(0), B.stride(0), index_stride,
            **large, num_warps=_warps(sizes.exact_warps, headdim), num_stages=sizes.state_stages,
        )  # fmt: skip
    scan = (
        x, B, C, D, out, softplus_dt, decay, weight, total, product, segment_state, *where, *search,
        tokens, blocks, x.stride(0), B.stride(0), C.stride(0), out.stride(0), index_stride,
    )  # fmt: skip
    large["MOST_DECAY"] = MOST_DECAY
    heads = 0
    if sizes.is_factored and x.dtype != torch.float16:
        heads = _heads(sizes.scan_heads, headdim, nheads // ngroups)
        # an NVIDIA compiler option
        registers = _scan_registers(d_state) if sizes.scan_registers == 0 else sizes.scan_registers
        limits = {"maxnreg": registers} if registers and is_nvidia(x.device) else {}
        launch(_ssd_scan_kernel, (nheads // heads, parts), x)(
            *scan, **large, HEADS=heads, PAIRED=heads, FACTORED=True,
            num_warps=_warps(sizes.scan_warps, heads * headdim), num_stages=sizes.scan_stages, **limits,
        )  # fmt: skip
    launch(_ssd_scan_kernel, (nheads, parts), x)(
        *scan, **large, HEADS=1, PAIRED=heads, FACTORED=False,
        num_warps=_warps(sizes.exact_warps, headdim), num_stages=sizes.exact_stages,
    )  # fmt: skip
