"""The mathematics on one page, in plain PyTorch: what every kernel of this package must compute.

Everything runs in the dtype of ``x`` (give float64 for an exact answer), one token at a time, and is slow.
"""

from itertools import pairwise

import torch
from torch.nn import functional

# vLLM's NULL_BLOCK_ID: a sequence whose state index is 0 is padding and is not processed.
NULL_SLOT = 0


def softplus(dt: torch.Tensor) -> torch.Tensor:
    """``log1p(exp(dt))``, and ``dt`` itself above 20, as in the Mamba kernels."""
    return functional.softplus(dt, threshold=20.0)


def filter_dt_reference(
    dt: torch.Tensor, dt_bias: torch.Tensor, dt_threshold: torch.Tensor, token_rows: torch.Tensor
) -> None:
    """See :func:`kernels.filter_dt.filter_dt_`; compares in float32 as the kernels do. In place."""
    step = softplus(dt.float() + dt_bias.float())
    dt.masked_fill_(step <= dt_threshold[token_rows.long()], float("-inf"))


def _filtered_steps(
    dt: torch.Tensor,
    dt_bias: torch.Tensor,
    dt_threshold: torch.Tensor | None,
    seq_rows: torch.Tensor | None,
    seq_prompt_tokens: torch.Tensor | None,
    sequence: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Step sizes of one sequence: (its tokens, channels), softplus applied, 0 where filtered."""
    step = softplus(dt.to(dtype) + dt_bias.to(dtype))
    if dt_threshold is None or seq_rows is None or seq_prompt_tokens is None:
        return step
    is_prompt = torch.arange(len(step), device=dt.device) < seq_prompt_tokens[sequence]
    is_filtered = (step <= dt_threshold[seq_rows[sequence]]) & is_prompt[:, None]
    return step.masked_fill(is_filtered, 0.0)


def filtered_scan_reference(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    z: torch.Tensor | None,
    dt_bias: torch.Tensor,
    state: torch.Tensor,
    query_start_loc: torch.Tensor,
    state_indices: torch.Tensor,
    has_initial_state: torch.Tensor,
    dt_threshold: torch.Tensor | None = None,
    seq_rows: torch.Tensor | None = None,
    seq_prompt_tokens: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """See :func:`kernels.filtered_scan.filtered_scan`. Mamba (arXiv 2312.00752) equation 2; LongMamba equation 6.

    Returns:
        (tokens, d_inner) in ``x.dtype``; ``state`` is updated in place.
    """
    dtype = x.dtype
    out = torch.zeros(x.shape, dtype=dtype, device=x.device) if out is None else out
    A, B, C, D = (tensor.to(dtype) for tensor in (A, B, C, D))
    bounds = query_start_loc.tolist()
    for sequence, (start, end) in enumerate(pairwise(bounds)):
        slot = int(state_indices[sequence])
        if slot == NULL_SLOT or start == end:
            continue
        step = _filtered_steps(dt[start:end], dt_bias, dt_threshold, seq_rows, seq_prompt_tokens, sequence, dtype)
        h = state[slot].to(dtype) if has_initial_state[sequence] else torch.zeros_like(state[slot], dtype=dtype)
        for token, step_t in zip(range(start, end), step, strict=True):
            # (d_inner, d_state): decay, then feed
            h = torch.exp(step_t[:, None] * A) * h + (step_t * x[token])[:, None] * B[token]
            y = h @ C[token] + D * x[token]
            out[token] = y if z is None else y * functional.silu(z[token].to(dtype))
        state[slot] = h.to(state.dtype)
    return out


def filtered_ssd_reference(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    dt_bias: torch.Tensor,
    state: torch.Tensor,
    query_start_loc: torch.Tensor,
    state_indices: torch.Tensor,
    has_initial_state: torch.Tensor,
    dt_threshold: torch.Tensor | None = None,
    seq_rows: torch.Tensor | None = None,
    seq_prompt_tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mamba-2 (arXiv 2405.21060, section 5): one decay per head, and the filter per head.

    Args:
        x: (tokens, nheads, headdim).
        dt: (tokens, nheads), before bias and softplus.
        A, D, dt_bias: (nheads,); A negative.
        B, C: (tokens, ngroups, d_state); head h belongs to group ``h * ngroups // nheads``.
        state: (slots, nheads, headdim, d_state), updated in place.
        query_start_loc, state_indices, has_initial_state, dt_threshold, seq_rows, seq_prompt_tokens: as in
            :func:`kernels.filtered_scan.filtered_scan`, with nheads channels.

    Returns:
        (tokens, nheads, headdim) in ``x.dtype``.
    """
    dtype = x.dtype
    nheads, ngroups = x.shape[1], B.shape[1]
    out = torch.zeros_like(x)
    A, D = A.to(dtype), D.to(dtype)
    B = B.to(dtype).repeat_interleave(nheads // ngroups, dim=1)
    C = C.to(dtype).repeat_interleave(nheads // ngroups, dim=1)
    bounds = query_start_loc.tolist()
    for sequence, (start, end) in enumerate(pairwise(bounds)):
        slot = int(state_indices[sequence])
        if slot == NULL_SLOT or start == end:
            continue
        step = _filtered_steps(dt[start:end], dt_bias, dt_threshold, seq_rows, seq_prompt_tokens, sequence, dtype)
        h = state[slot].to(dtype) if has_initial_state[sequence] else torch.zeros_like(state[slot], dtype=dtype)
        for token, step_t in zip(range(start, end), step, strict=True):
            # (nheads, headdim, d_state)
            feed = (step_t[:, None] * x[token])[:, :, None] * B[token][:, None, :]
            h = torch.exp(step_t * A)[:, None, None] * h + feed
            out[token] = torch.einsum("hpn,hn->hp", h, C[token]) + D[:, None] * x[token]
        state[slot] = h.to(state.dtype)
    return out
