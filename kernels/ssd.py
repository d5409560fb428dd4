"""Mamba-2 prefill: the state space model (SSD) with the LongMamba filter, over a flattened batch of sequences."""

import torch

from .dispatch import FLOATS, check_tensor, uses_triton
from .reference import ssd_reference


def ssd_supports(headdim: int, d_state: int) -> bool:
    """Whether :func:`ssd` runs heads of this shape; larger states fit no multiprocessor's registers."""
    return headdim in (16, 32, 64, 128) and d_state <= 128


def ssd(
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
    out: torch.Tensor | None = None,
    check: bool = True,
) -> torch.Tensor:
    """Run ``h = exp(dt A) h + dt x B^T; out = h C + D x`` per head, with ``dt = softplus(dt + dt_bias)``.

    With a threshold table, a prompt token with ``dt <= dt_threshold[seq_rows[s], head]`` gets ``dt = 0``. Matrix
    products take operands in ``x.dtype`` and add up in float32; those of float32 are about as exact as float32.
    Only shapes are read on the host. Mamba-2 (arXiv 2405.21060), section 6; LongMamba (arXiv 2504.16053), equation 6.

    Scratch memory on a GPU: 12 bytes per token and head, and the float32 state of all heads per 256 to 4096 tokens.

    Args:
        x: (tokens, nheads, headdim) bfloat16, float16 or float32, the sequences one after the other. The heads of a
            token lie one after the other, tokens any distance apart. headdim a power of two from 16 to 128.
        dt: (tokens, nheads), before bias and softplus; last stride 1.
        A: (nheads,) float32, contiguous, negative.
        B, C: (tokens, ngroups, d_state) in ``x.dtype``, laid out like ``x``; head h belongs to group
            ``h * ngroups // nheads``. d_state at most 128.
        D: (nheads,) floating point, contiguous.
        dt_bias: (nheads,) floating point, contiguous.
        state: (slots, nheads, headdim, d_state) float32, bfloat16 or float16 cache; the slots may lie any distance
            apart. Updated in place: each sequence's last state goes to its slot.
        query_start_loc: (sequences + 1,) int32, first 0: where each sequence starts.
        state_indices: (sequences,) int32: each sequence's slot. 0 is vLLM's NULL block: such a sequence is padding, its
            state is left alone and its rows of ``out`` are not written.
        has_initial_state: (sequences,) bool: start from the slot's state, not from zero.
        dt_threshold: (rows, nheads) float32, contiguous, in units of dt after softplus; row 0 and local heads are -1.
            None switches the filter off.
        seq_rows: (sequences,) int32: each sequence's row; needed with ``dt_threshold``.
        seq_prompt_tokens: (sequences,) int32: how many of a sequence's first tokens in this call are prompt tokens.
        checkpoints: (sequences,) int32: behind how many of a sequence's tokens of this call its state is also wanted, 0
            for a sequence where it is not, at most its tokens. None: of no sequence.
        checkpoint_state: (sequences, nheads, headdim, d_state) in ``state.dtype``, contiguous, to write these states
            to; needed with ``checkpoints``. Sequences without a checkpoint and padding are left alone.
        out: (tokens, nheads, headdim) in ``x.dtype``, laid out like ``x``, to write to. None allocates it.
        check: False leaves the checks out, for a caller whose arguments of this layout have passed them before.

    Returns:
        ``out``, (tokens, nheads, headdim) in ``x.dtype``.

    Raises:
        ValueError: for a wrong shape, dtype, stride or device.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    tensors = (x, dt, A, B, C, D, dt_bias, state, query_start_loc, state_indices, has_initial_state)
    filters = (dt_threshold, seq_rows, seq_prompt_tokens)
    wanted = (checkpoints, checkpoint_state)
    if check:
        _check(*tensors, out)
        _check_filter(x, len(state_indices), *filters)
        _check_checkpoints(x, state, len(state_indices), *wanted)
    if x.numel() == 0 or state_indices.shape[0] == 0:
        return out
    if uses_triton(x):
        from .ssd_triton import ssd_triton

        ssd_triton(*tensors, *filters, out, *wanted)
        return out
    y = ssd_reference(x.float(), *tensors[1:], *filters, *wanted)
    is_padding = (state_indices == 0).repeat_interleave(query_start_loc.diff(), output_size=len(x))
    out.copy_(torch.where(is_padding[:, None, None], out, y.to(out.dtype)))
    return out


def _check(
    x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, D: torch.Tensor,
    dt_bias: torch.Tensor, state: torch.Tensor, query_start_loc: torch.Tensor, state_indices: torch.Tensor,
    has_initial_state: torch.Tensor, out: torch.Tensor,
) -> None:  # fmt: skip
    if x.dim() != 3 or B.dim() != 3 or state.dim() != 4:
        raise ValueError(
            "x must be (tokens, nheads, headdim), B (tokens, ngroups, d_state) and state (slots, nheads, headdim, "
            f"d_state), got {tuple(x.shape)}, {tuple(B.shape)} and {tuple(state.shape)}"
        )
    (tokens, nheads, headdim), (ngroups, d_state), sequences = x.shape, B.shape[1:], len(state_indices)
    device, int32 = x.device, (torch.int32,)
    if not ssd_supports(headdim, d_state) or ngroups == 0 or nheads % ngroups:
        raise ValueError(
            "headdim must be a power of two from 16 to 128, d_state at most 128 and nheads a multiple of ngroups, "
            f"got headdim {headdim}, d_state {d_state}, nheads {nheads} and ngroups {ngroups}"
        )
    check_tensor("x", x, (tokens, nheads, headdim), FLOATS, device, contiguous=False)
    check_tensor("out", out, (tokens, nheads, headdim), (x.dtype,), device, contiguous=False)
    check_tensor("B", B, (tokens, ngroups, d_state), (x.dtype,), device, contiguous=False)
    check_tensor("C", C, (tokens, ngroups, d_state), (x.dtype,), device, contiguous=False)
    for name, tensor in (("x", x), ("out", out), ("B", B), ("C", C)):
        if tokens and tensor.shape[1] > 1 and tensor.stride(1) != tensor.shape[2]:
            raise ValueError(
                f"the heads or groups of a token of {name} must be adjacent, got strides {tensor.stride()}"
            )
    check_tensor("dt", dt, (tokens, nheads), FLOATS, device, contiguous=False)
    check_tensor("A", A, (nheads,), (torch.float32,), device)
    check_tensor("D", D, (nheads,), FLOATS, device)
    check_tensor("dt_bias", dt_bias, (nheads,), FLOATS, device)
    check_tensor("state", state, (len(state), nheads, headdim, d_state), FLOATS, device, contiguous=False)
    if len(state) and not state[0].is_contiguous():
        raise ValueError(f"each slot of state must be contiguous, got strides {state.stride()}")
    check_tensor("query_start_loc", query_start_loc, (sequences + 1,), int32, device)
    check_tensor("state_indices", state_indices, (sequences,), int32, device, contiguous=False)
    check_tensor("has_initial_state", has_initial_state, (sequences,), (torch.bool,), device)


def _check_filter(
    x: torch.Tensor, sequences: int, dt_threshold: torch.Tensor | None,
    seq_rows: torch.Tensor | None, seq_prompt_tokens: torch.Tensor | None,
) -> None:  # fmt: skip
    if dt_threshold is None:
        return
    if seq_rows is None or seq_prompt_tokens is None:
        raise ValueError("dt_threshold needs seq_rows and seq_prompt_tokens beside it; one of them came as None")
    rows = dt_threshold.shape[0] if dt_threshold.dim() == 2 else 1
    check_tensor("dt_threshold", dt_threshold, (rows, x.shape[1]), (torch.float32,), x.device)
    check_tensor("seq_rows", seq_rows, (sequences,), (torch.int32,), x.device)
    check_tensor("seq_prompt_tokens", seq_prompt_tokens, (sequences,), (torch.int32,), x.device)


def _check_checkpoints(
    x: torch.Tensor, state: torch.Tensor, sequences: int, checkpoints: torch.Tensor | None,
    checkpoint_state: torch.Tensor | None,
) -> None:  # fmt: skip
    if checkpoints is None and checkpoint_state is None:
        return
    if checkpoints is None or checkpoint_state is None:
        raise ValueError("checkpoints and checkpoint_state need each other; one of them came as None")
    shape = (sequences, *state.shape[1:])
    check_tensor("checkpoints", checkpoints, (sequences,), (torch.int32,), x.device)
    check_tensor("checkpoint_state", checkpoint_state, shape, (state.dtype,), x.device)
