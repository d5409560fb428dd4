"""Mamba-1 prefill: the selective scan with the LongMamba filter, over a flattened batch of sequences."""

import torch

from .dispatch import FLOATS, check_tensor, uses_triton


def selective_scan(
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
    check: bool = True,
) -> torch.Tensor:
    """Run ``h = exp(dt A) h + dt B x; out = (C h + D x) * silu(z)`` per channel, with ``dt = softplus(dt + dt_bias)``.

    With a threshold table, a prompt token with ``dt <= dt_threshold[seq_rows[s], channel]`` gets ``dt = 0``: its state
    is neither decayed nor fed, its output still reads the state. Everything is accumulated in float32. Cutting a
    sequence into several calls through ``state`` changes only the rounding. Only shapes are read on the host.
    Mamba (arXiv 2312.00752) equation 2; LongMamba (arXiv 2504.16053) equation 6.

    Every tokens-major argument needs a last stride of 1 and may have any row stride (a column slice of a wider
    projection). They are compiled for the row strides of x, dt, z and out: seconds at a model's first call.
    Scratch memory on a GPU: at most ``d_state / 16`` bytes per token and channel in long batches.

    Args:
        x: (tokens, d_inner) bfloat16, float16 or float32; the sequences of the batch one after the other.
        dt: (tokens, d_inner), before bias and softplus.
        A: (d_inner, d_state) float32, contiguous, negative.
        B, C: (tokens, d_state).
        D: (d_inner,) floating point, contiguous.
        z: (tokens, d_inner) gate, or None for no gate.
        dt_bias: (d_inner,) floating point, contiguous.
        state: (slots, d_inner, d_state) float32, bfloat16 or float16 cache; the slots may lie any distance apart.
            Updated in place: each sequence's last state goes to its slot.
        query_start_loc: (sequences + 1,) int32, first 0: where each sequence starts.
        state_indices: (sequences,) int32: each sequence's slot. 0 is vLLM's NULL block: such a sequence is padding, its
            state is left alone and its rows of ``out`` are not written.
        has_initial_state: (sequences,) bool: start from the slot's state, not from zero.
        dt_threshold: (rows, d_inner) float32, contiguous, in units of dt after softplus; row 0 and local channels are
            -1 (nothing filtered). None switches the filter off.
        seq_rows: (sequences,) int32: each sequence's row; needed with ``dt_threshold``.
        seq_prompt_tokens: (sequences,) int32: how many of a sequence's first tokens in this call are prompt tokens; the
            others are never filtered. Needed with ``dt_threshold``.
        out: (tokens, d_inner) in ``x.dtype`` to write to; may be ``z`` itself. None allocates it.
        check: False leaves the checks out, for a caller whose arguments of this layout have passed them before.

    Returns:
        ``out``, (tokens, d_inner) in ``x.dtype``.

    Raises:
        ValueError: for a wrong shape, dtype, stride or device.
        ImportError: on a CPU without numba.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    tensors = (x, dt, A, B, C, D, z, dt_bias, state, query_start_loc, state_indices, has_initial_state)
    filters = (dt_threshold, seq_rows, seq_prompt_tokens)
    if check:
        _check(*tensors, *filters, out)
    if x.numel() == 0 or state_indices.shape[0] == 0:
        return out
    if uses_triton(x):
        from .selective_scan_triton import selective_scan_triton

        selective_scan_triton(*tensors, *filters, out)
    else:
        from .selective_scan_cpu import selective_scan_cpu

        selective_scan_cpu(*tensors, *filters, out)
    return out


def _check(
    x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, D: torch.Tensor,
    z: torch.Tensor | None, dt_bias: torch.Tensor, state: torch.Tensor,
    query_start_loc: torch.Tensor, state_indices: torch.Tensor, has_initial_state: torch.Tensor,
    dt_threshold: torch.Tensor | None, seq_rows: torch.Tensor | None, seq_prompt_tokens: torch.Tensor | None,
    out: torch.Tensor,
) -> None:  # fmt: skip
    if x.dim() != 2 or A.dim() != 2 or state.dim() != 3:
        raise ValueError(
            "x must be (tokens, d_inner), A (d_inner, d_state) and state (slots, d_inner, d_state), "
            f"got {tuple(x.shape)}, {tuple(A.shape)} and {tuple(state.shape)}"
        )
    (tokens, d_inner), d_state, sequences = x.shape, A.shape[1], len(state_indices)
    device, float32, int32 = x.device, (torch.float32,), (torch.int32,)
    for name, tensor in (("x", x), ("dt", dt), ("z", z)):
        if tensor is not None:
            check_tensor(name, tensor, (tokens, d_inner), FLOATS, device, contiguous=False)
    check_tensor("out", out, (tokens, d_inner), (x.dtype,), device, contiguous=False)
    check_tensor("B", B, (tokens, d_state), FLOATS, device, contiguous=False)
    check_tensor("C", C, (tokens, d_state), FLOATS, device, contiguous=False)
    check_tensor("A", A, (d_inner, d_state), float32, device)
    check_tensor("D", D, (d_inner,), FLOATS, device)
    check_tensor("dt_bias", dt_bias, (d_inner,), FLOATS, device)
    check_tensor("state", state, (state.shape[0], d_inner, d_state), FLOATS, device, contiguous=False)
    if state.shape[0] and not state[0].is_contiguous():
        raise ValueError(f"each slot of state must be contiguous (d_inner, d_state), got strides {state.stride()}")
    check_tensor("query_start_loc", query_start_loc, (sequences + 1,), int32, device)
    check_tensor("state_indices", state_indices, (sequences,), int32, device)
    check_tensor("has_initial_state", has_initial_state, (sequences,), (torch.bool,), device)
    if dt_threshold is None:
        return
    if seq_rows is None or seq_prompt_tokens is None:
        raise ValueError("dt_threshold needs seq_rows and seq_prompt_tokens beside it; one of them came as None")
    rows = dt_threshold.shape[0] if dt_threshold.dim() == 2 else 1
    check_tensor("dt_threshold", dt_threshold, (rows, d_inner), float32, device)
    check_tensor("seq_rows", seq_rows, (sequences,), int32, device)
    check_tensor("seq_prompt_tokens", seq_prompt_tokens, (sequences,), int32, device)
