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
    is_filtered = softplus(dt.float() + dt_bias.float()) <= dt_threshold[token_rows.long()]
    dt.masked_fill_(is_filtered, float("-inf"))


def _filtered_dt(
    dt: torch.Tensor,
    dt_bias: torch.Tensor,
    dt_threshold: torch.Tensor | None,
    seq_rows: torch.Tensor | None,
    seq_prompt_tokens: torch.Tensor | None,
    sequence: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """dt of one sequence: (its tokens, channels), softplus applied, 0 where filtered."""
    dt = softplus(dt.to(dtype) + dt_bias.to(dtype))
    if dt_threshold is None or seq_rows is None or seq_prompt_tokens is None:
        return dt
    is_prompt = torch.arange(len(dt), device=dt.device) < seq_prompt_tokens[sequence]
    is_filtered = (dt <= dt_threshold[seq_rows[sequence]]) & is_prompt[:, None]
    return dt.masked_fill(is_filtered, 0.0)


def selective_scan_reference(
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
    """See :func:`kernels.selective_scan.selective_scan`. Mamba (arXiv 2312.00752) equation 2; LongMamba equation 6.

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
        own_dt = _filtered_dt(dt[start:end], dt_bias, dt_threshold, seq_rows, seq_prompt_tokens, sequence, dtype)
        h = state[slot].to(dtype) if has_initial_state[sequence] else torch.zeros_like(state[slot], dtype=dtype)
        for token, dt_t in zip(range(start, end), own_dt, strict=True):
            # (d_inner, d_state): decay, then feed
            h = torch.exp(dt_t[:, None] * A) * h + (dt_t * x[token])[:, None] * B[token]
            y = h @ C[token] + D * x[token]
            out[token] = y if z is None else y * functional.silu(z[token].to(dtype))
        state[slot] = h.to(state.dtype)
    return out


def ssd_reference(
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
    checkpoints: torch.Tensor | None = None,
    checkpoint_state: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mamba-2 (arXiv 2405.21060, section 5): one decay per head, and the filter per head.

    Args:
        x: (tokens, nheads, headdim).
        dt: (tokens, nheads), before bias and softplus.
        A, D, dt_bias: (nheads,); A negative.
        B, C: (tokens, ngroups, d_state); head h belongs to group ``h * ngroups // nheads``.
        state: (slots, nheads, headdim, d_state), updated in place.
        query_start_loc, state_indices, has_initial_state, dt_threshold, seq_rows, seq_prompt_tokens: as in
            :func:`kernels.selective_scan.selective_scan`, with nheads channels.
        checkpoints: (sequences,): behind how many tokens of this call a sequence's state is also wanted, 0 for none.
        checkpoint_state: (sequences, nheads, headdim, d_state), updated in place: the states there.

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
        own_dt = _filtered_dt(dt[start:end], dt_bias, dt_threshold, seq_rows, seq_prompt_tokens, sequence, dtype)
        h = state[slot].to(dtype) if has_initial_state[sequence] else torch.zeros_like(state[slot], dtype=dtype)
        for token, dt_t in zip(range(start, end), own_dt, strict=True):
            # (nheads, headdim, d_state)
            feed = (dt_t[:, None] * x[token])[:, :, None] * B[token][:, None, :]
            h = torch.exp(dt_t * A)[:, None, None] * h + feed
            out[token] = torch.einsum("hpn,hn->hp", h, C[token]) + D[:, None] * x[token]
            if checkpoints is not None and checkpoint_state is not None and token + 1 - start == checkpoints[sequence]:
                checkpoint_state[sequence] = h.to(checkpoint_state.dtype)
        state[slot] = h.to(state.dtype)
    return out


def causal_conv1d_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    conv_state: torch.Tensor,
    query_start_loc: torch.Tensor,
    state_indices: torch.Tensor,
    has_initial_state: torch.Tensor,
    dt: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_threshold: torch.Tensor | None = None,
    seq_rows: torch.Tensor | None = None,
    seq_prompt_tokens: torch.Tensor | None = None,
    silu: bool = True,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """See :func:`kernels.causal_conv1d.causal_conv1d`.

    Returns:
        (tokens, channels) in ``x.dtype``; ``conv_state`` and ``dt`` are updated in place.
    """
    width = weight.shape[1]
    out = torch.zeros_like(x) if out is None else out
    bounds = query_start_loc.tolist()
    for sequence, (start, end) in enumerate(pairwise(bounds)):
        slot = int(state_indices[sequence])
        if slot == NULL_SLOT or start == end:
            continue
        before = conv_state[slot].T.to(x.dtype) if has_initial_state[sequence] else x.new_zeros(width - 1, x.shape[1])
        inputs = torch.cat([before, x[start:end]])
        # (tokens, channels, width)
        y = (inputs.unfold(0, width, 1) * weight.to(x.dtype)).sum(-1) + (0.0 if bias is None else bias.to(x.dtype))
        out[start:end] = functional.silu(y) if silu else y
        conv_state[slot] = inputs[-(width - 1) :].T.to(conv_state.dtype)
        if dt is not None and dt_bias is not None and dt_threshold is not None:
            if seq_rows is None or seq_prompt_tokens is None:
                raise ValueError("dt_threshold needs seq_rows and seq_prompt_tokens; one of them came as None")
            prompt = dt[start : min(end, start + int(seq_prompt_tokens[sequence]))]
            filter_dt_reference(prompt, dt_bias, dt_threshold, seq_rows[sequence].expand(len(prompt)))
    return out


def causal_conv1d_update_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    conv_state: torch.Tensor,
    state_indices: torch.Tensor,
    silu: bool = True,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """See :func:`kernels.causal_conv1d_update.causal_conv1d_update`: sequences of one token each.

    Returns:
        (batch, channels) in ``x.dtype``, 0 in rows of padding; ``conv_state`` is updated in place.
    """
    out = torch.empty_like(x) if out is None else out
    out.zero_()
    batch = x.shape[0]
    one_each = torch.arange(batch + 1, dtype=torch.int32, device=x.device)
    has_initial_state = torch.ones(batch, dtype=torch.bool, device=x.device)
    where = (conv_state, one_each, state_indices, has_initial_state)
    return causal_conv1d_reference(x, weight, bias, *where, silu=silu, out=out)


def selective_state_update_reference(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    z: torch.Tensor | None,
    dt_bias: torch.Tensor,
    state_indices: torch.Tensor,
    dt_threshold: torch.Tensor | None = None,
    token_rows: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    dt_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """See :func:`kernels.selective_state_update.selective_state_update`: a batch of sequences of one token each.

    Returns:
        (batch, d_inner) in ``x.dtype``, 0 in rows of padding; ``state`` is updated in place.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    out.zero_()
    if dt_weight is not None:
        dt = dt.to(x.dtype) @ dt_weight.to(x.dtype).T
    batch, d_state = x.shape[0], state.shape[2]
    one_each = torch.arange(batch + 1, dtype=torch.int32, device=x.device)
    filters = (dt_threshold, token_rows, torch.ones_like(state_indices))
    where = (state, one_each, state_indices, torch.ones(batch, dtype=torch.bool, device=x.device))
    if A.dim() == 2:
        return selective_scan_reference(x, dt, A, B, C, D, z, dt_bias, *where, *filters, out)
    nheads, headdim = A.shape[0], x.shape[1] // A.shape[0]
    heads, groups = (batch, nheads, headdim), (batch, B.shape[1] // d_state, d_state)
    y = ssd_reference(
        x.reshape(heads), dt, A, B.reshape(groups), C.reshape(groups), D, dt_bias,
        state.view(-1, nheads, headdim, d_state), *where[1:], *filters,
    ).flatten(1)  # fmt: skip
    is_row = (state_indices != NULL_SLOT)[:, None]
    return out.copy_((y if z is None else y * functional.silu(z.to(y.dtype))) * is_row)


def gated_norm_reference(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    """See :func:`kernels.gated_norm.gated_norm`."""
    x = x * functional.silu(gate.to(x.dtype))
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.to(x.dtype)


def norm_parts_reference(
    x: torch.Tensor,
    rank: int,
    eps: float = 1e-6,
    dt_weight: torch.Tensor | None = None,
    B_weight: torch.Tensor | None = None,
    C_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """See :func:`kernels.norm_parts.norm_parts_`; not in place."""
    d_state = (x.shape[1] - rank) // 2
    parts = []
    sizes = [rank, d_state, d_state]
    for part, weight in zip(torch.split(x, sizes, 1), (dt_weight, B_weight, C_weight), strict=True):
        normalized = part * torch.rsqrt(part.square().mean(-1, keepdim=True) + eps)
        parts.append(normalized if weight is None else normalized * weight.to(x.dtype))
    return torch.cat(parts, 1)


def small_product_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    gate: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """See :func:`kernels.small_product.small_product`."""
    if gate is not None and norm_weight is not None:
        x = gated_norm_reference(x, gate, norm_weight, eps)
    return x @ weight.to(x.dtype).t()
