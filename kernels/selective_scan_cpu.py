"""The filtered selective scan on a CPU, compiled by numba; imported by the wrapper only where it is needed.

PyTorch applies softplus, filter and gate; numba runs the recurrence. The first call compiles (seconds), and
numba keeps the result on disk where it can write.
"""

# mypy: ignore-errors
# numba compiles from the types that come at run time.

import functools
import os
from itertools import pairwise

import numba
import numpy as np
import torch

from .reference import NULL_SLOT, softplus

# channels that one task runs at a time: their states stay in the first-level cache
CHANNELS = 64


def _compile(**options):
    """``numba.njit``, cached on disk where numba finds a place that it can write to."""

    def decorate(function):
        try:
            return numba.njit(cache=True, **options)(function)
        except RuntimeError:
            return numba.njit(**options)(function)

    return decorate


@_compile(inline="always", error_model="numpy", fastmath={"contract"})
def _exp_negative(v):
    """``exp(v)`` for v <= 0 in float32, to 2e-7 relative; branch-free, so that loops over it become vector code."""
    v = max(v, np.float32(-87.0))
    whole = np.int32(v * np.float32(1.4426950408889634) - np.float32(0.5))
    # the remainder from ln(2) in two parts: rounded once, it would cost 4e-6 at v = -80
    f = v - np.float32(whole) * np.float32(0.693359375) + np.float32(whole) * np.float32(2.12194440e-4)
    p = np.float32(1.0 / 5040.0)
    p = p * f + np.float32(1.0 / 720.0)
    p = p * f + np.float32(1.0 / 120.0)
    p = p * f + np.float32(1.0 / 24.0)
    p = p * f + np.float32(1.0 / 6.0)
    p = p * f + np.float32(0.5)
    p = p * f + np.float32(1.0)
    p = p * f + np.float32(1.0)
    power = np.int32((whole + np.int32(127)) << np.int32(23)).view(np.float32)
    return p * power


@_compile(error_model="numpy", fastmath={"contract"})
def _advance(h, decay_rates, dt, feeds, B_tn, C_tn, y):
    """One token and one state of a block of channels; all arguments but the scalars are (channels,)."""
    for c in range(h.shape[0]):
        h_c = _exp_negative(dt[c] * decay_rates[c]) * h[c] + feeds[c] * B_tn
        h[c] = h_c
        y[c] += h_c * C_tn


@_compile(parallel=True, error_model="numpy", fastmath={"contract"})
def _scan(x, dt, A, B, C, D, h_all, query_start_loc, is_active, out):
    """The recurrence of a whole batch, parallel over blocks of channels.

    x, dt, out: (tokens, d_inner); A: (d_state, d_inner); B, C: (tokens, d_state); D: (d_inner,);
    h_all: (sequences, d_state, d_inner), updated in place; query_start_loc: (sequences + 1,); is_active: (sequences,).
    """
    d_state, d_inner = A.shape
    for block in numba.prange((d_inner + CHANNELS - 1) // CHANNELS):
        first = block * CHANNELS
        last = min(first + CHANNELS, d_inner)
        for sequence in range(h_all.shape[0]):
            if not is_active[sequence]:
                continue
            for t in range(query_start_loc[sequence], query_start_loc[sequence + 1]):
                dt_t = dt[t, first:last]
                x_t = x[t, first:last]
                feeds = dt_t * x_t
                y = out[t, first:last]
                y[:] = D[first:last] * x_t
                is_kept = False
                for c in range(last - first):
                    is_kept |= dt_t[c] != np.float32(0.0)
                for n in range(d_state):
                    h = h_all[sequence, n, first:last]
                    if is_kept:
                        _advance(h, A[n, first:last], dt_t, feeds, B[t, n], C[t, n], y)
                    else:
                        # filtered in every channel of the block: the states stay, and no exponential is needed
                        for c in range(last - first):
                            y[c] += h[c] * C[t, n]


@functools.cache
def _start_threads() -> None:
    """Compile, and start numba's threads on all cores of this process.

    Threads inherit the cores of the one that starts them, and vLLM pins each of PyTorch's threads to one core. Where
    numba's threads are OpenMP's, it also sets how many PyTorch has, which is set back.
    """
    a = np.zeros((1, 1), np.float32)
    pytorch_threads = torch.get_num_threads()
    own_cores = os.sched_getaffinity(0) if hasattr(os, "sched_setaffinity") else None
    try:
        if own_cores is not None:
            threads = os.listdir("/proc/self/task")
            os.sched_setaffinity(0, set().union(*(os.sched_getaffinity(int(thread)) for thread in threads)))
        _scan(a, a, a, a, a, a[0], a[None], np.zeros(2, np.int32), np.zeros(1, bool), a)
    finally:
        torch.set_num_threads(pytorch_threads)
        if own_cores is not None:
            os.sched_setaffinity(0, own_cores)


def _filtered_dt(dt, dt_bias, query_start_loc, dt_threshold, seq_rows, seq_prompt_tokens) -> torch.Tensor:
    """(tokens, d_inner) float32: softplus(dt + dt_bias), 0 where filtered."""
    dt = softplus(dt.float() + dt_bias.float())
    if dt_threshold is None:
        return dt
    for sequence, (start, end) in enumerate(pairwise(query_start_loc)):
        prompt = dt[start : min(end, start + int(seq_prompt_tokens[sequence]))]
        if int(seq_rows[sequence]):
            prompt.masked_fill_(prompt <= dt_threshold[int(seq_rows[sequence])], 0.0)
    return dt


def selective_scan_cpu(
    x, dt, A, B, C, D, z, dt_bias, state, query_start_loc, state_indices, has_initial_state,
    dt_threshold, seq_rows, seq_prompt_tokens, out,
) -> None:  # fmt: skip
    """Run checked arguments; see :func:`kernels.selective_scan.selective_scan`."""
    _start_threads()
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
    bounds = query_start_loc.tolist()
    dt = _filtered_dt(dt, dt_bias, bounds, dt_threshold, seq_rows, seq_prompt_tokens)
    # states before channels: the inner loops run over channels and become vector code for any d_state
    h = state[state_indices.long()].float().masked_fill_(~has_initial_state[:, None, None], 0.0)
    h = h.transpose(1, 2).contiguous()
    is_active = (state_indices != NULL_SLOT) & (query_start_loc[1:] > query_start_loc[:-1])
    y = torch.empty(x.shape, dtype=torch.float32)
    inputs = (x.float(), dt, A.T, B.float(), C.float(), D.float(), h, query_start_loc, is_active, y)
    _scan(*(tensor.contiguous().numpy() for tensor in inputs))
    state[state_indices[is_active].long()] = h[is_active].transpose(1, 2).to(state.dtype)
    for sequence, (start, end) in enumerate(pairwise(bounds)):
        if is_active[sequence]:
            gate = 1.0 if z is None else torch.nn.functional.silu(z[start:end].float())
            out[start:end] = y[start:end] * gate
