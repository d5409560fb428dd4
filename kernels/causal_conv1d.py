"""Prefill: the short causal convolution in front of every Mamba layer, and Mamba-2's filter in the same launch."""

import torch

from .dispatch import FLOATS, check_tensor, uses_triton
from .reference import causal_conv1d_reference


def causal_conv1d(
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
    check: bool = True,
) -> torch.Tensor:
    """Run ``out[t] = silu(bias + sum_k weight[:, k] * x[t - width + 1 + k])`` within each sequence of a batch.

    What lies in front of a sequence is its slot of ``conv_state``, or zero. With a threshold table, the raw ``dt`` of
    the same tokens is filtered beside it: -inf where :func:`kernels.filter_dt.filter_dt_` would write it, without a
    launch of its own. Everything is accumulated in float32. Only shapes are read on the host.

    Args:
        x: (tokens, channels), the sequences of the batch one after the other; last stride 1, any row stride.
        weight: (channels, width) contiguous, width at least 2.
        bias: (channels,) contiguous, or None.
        conv_state: (slots, channels, width - 1), any strides. Updated in place: each sequence's last inputs.
        query_start_loc: (sequences + 1,) int32, first 0: where each sequence starts.
        state_indices: (sequences,) int32: each sequence's slot. 0 is vLLM's NULL block: such a sequence is padding, its
            state is left alone and its rows of ``out`` are not written.
        has_initial_state: (sequences,) bool: start from the slot's state, not from zero.
        dt: (tokens, nheads), before bias and softplus; last stride 1. Changed in place; needed with ``dt_threshold``.
        dt_bias: (nheads,) contiguous; needed with ``dt_threshold``.
        dt_threshold: (rows, nheads) float32, contiguous, in units of dt after softplus; row 0 and local heads are -1.
            None switches the filter off.
        seq_rows: (sequences,) int32: each sequence's row; needed with ``dt_threshold``.
        seq_prompt_tokens: (sequences,) int32: how many of a sequence's first tokens in this call are prompt tokens.
        silu: False leaves the activation out.
        out: (tokens, channels) in ``x.dtype`` to write to, not ``x`` itself. None allocates it.
        check: False leaves the checks out, for a caller whose arguments of this layout have passed them before.

    Returns:
        ``out``, (tokens, channels) in ``x.dtype``.

    Raises:
        ValueError: for a wrong shape, dtype, stride or device.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    arguments = (x, weight, bias, conv_state, query_start_loc, state_indices, has_initial_state)
    filters = (dt, dt_bias, dt_threshold, seq_rows, seq_prompt_tokens)
    if check:
        _check(*arguments, out)
        _check_filter(x, len(state_indices), *filters)
    if x.numel() == 0 or state_indices.shape[0] == 0:
        return out
    if uses_triton(x):
        from .causal_conv1d_triton import causal_conv1d_triton

        causal_conv1d_triton(*arguments, *filters, silu, out)
    else:
        # in float32, as on a GPU
        out.copy_(causal_conv1d_reference(x.float(), *arguments[1:], *filters, silu, out.float()))
    return out


def _check(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, conv_state: torch.Tensor,
    query_start_loc: torch.Tensor, state_indices: torch.Tensor, has_initial_state: torch.Tensor, out: torch.Tensor,
) -> None:  # fmt: skip
    if x.dim() != 2 or weight.dim() != 2 or conv_state.dim() != 3 or weight.shape[1] < 2:
        raise ValueError(
            "x must be (tokens, channels), weight (channels, width >= 2) and conv_state (slots, channels, width - 1), "
            f"got {tuple(x.shape)}, {tuple(weight.shape)} and {tuple(conv_state.shape)}"
        )
    (tokens, channels), width, sequences, device = x.shape, weight.shape[1], len(state_indices), x.device
    check_tensor("x", x, (tokens, channels), FLOATS, device, contiguous=False)
    check_tensor("out", out, (tokens, channels), (x.dtype,), device, contiguous=False)
    check_tensor("weight", weight, (channels, width), FLOATS, device)
    if bias is not None:
        check_tensor("bias", bias, (channels,), FLOATS, device)
    if tuple(conv_state.shape[1:]) != (channels, width - 1) or conv_state.device != device:
        raise ValueError(
            f"conv_state must be (slots, {channels}, {width - 1}) on {device}, "
            f"got {tuple(conv_state.shape)} on {conv_state.device}"
        )
    check_tensor("query_start_loc", query_start_loc, (sequences + 1,), (torch.int32,), device)
    check_tensor("state_indices", state_indices, (sequences,), (torch.int32,), device, contiguous=False)
    check_tensor("has_initial_state", has_initial_state, (sequences,), (torch.bool,), device)


def _check_filter(
    x: torch.Tensor, sequences: int, dt: torch.Tensor | None, dt_bias: torch.Tensor | None,
    dt_threshold: torch.Tensor | None, seq_rows: torch.Tensor | None, seq_prompt_tokens: torch.Tensor | None,
) -> None:  # fmt: skip
    if dt_threshold is None:
        return
    if dt is None or dt_bias is None or seq_rows is None or seq_prompt_tokens is None:
        raise ValueError("dt_threshold needs dt, dt_bias, seq_rows and seq_prompt_tokens; one of them came as None")
    nheads = dt.shape[-1]
    rows = dt_threshold.shape[0] if dt_threshold.dim() == 2 else 1
    check_tensor("dt", dt, (x.shape[0], nheads), FLOATS, x.device, contiguous=False)
    check_tensor("dt_bias", dt_bias, (nheads,), FLOATS, x.device)
    check_tensor("dt_threshold", dt_threshold, (rows, nheads), (torch.float32,), x.device)
    check_tensor("seq_rows", seq_rows, (sequences,), (torch.int32,), x.device)
    check_tensor("seq_prompt_tokens", seq_prompt_tokens, (sequences,), (torch.int32,), x.device)
