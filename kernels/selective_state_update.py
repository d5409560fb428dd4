"""Decode: one token of the recurrence with the LongMamba filter, for Mamba-1's channels and Mamba-2's heads."""

import torch

from .dispatch import FLOATS, check_tensor, uses_triton
from .reference import selective_state_update_reference

# Up to so many sequences x channels `dt_weight` saves more than it costs, on an H200.
MOST_PROJECTED = 16384


def selective_state_update(
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
    check: bool = True,
) -> torch.Tensor:
    """Run ``h = exp(dt A) h + dt B x; out = (C h + D x) * silu(z)`` for one token of each sequence of a batch.

    ``dt = softplus(dt + dt_bias)``, and 0 where LongMamba filters it: the last token of a prompt may come here. In
    float32. The launch depends on shapes only and nothing is read back, so a CUDA graph may capture it.
    Mamba (arXiv 2312.00752) equation 2; Mamba-2 (arXiv 2405.21060) section 5; LongMamba (arXiv 2504.16053) equation 6.

    Args:
        state: (slots, d_inner, d_state) cache; the slots may lie any distance apart. Updated in place.
        x: (batch, d_inner); like all (batch, ...) arguments with last stride 1 and any row stride.
        dt: (batch, channels), before bias and softplus; channels: d_inner for Mamba-1, nheads for Mamba-2.
        A: (d_inner, d_state) for Mamba-1, (nheads,) for Mamba-2; float32, contiguous, negative.
        B, C: (batch, ngroups * d_state); head h belongs to group ``h * ngroups // nheads``. Mamba-1 has one group.
        D, dt_bias: (channels,) contiguous.
        z: (batch, d_inner) gate, or None for no gate.
        state_indices: (batch,) int32, any stride: each sequence's slot. 0 is vLLM's NULL block: such a row is padding,
            its state is left alone, and its row of ``out`` is finite but means nothing.
        dt_threshold: (rows, channels) float32, contiguous, in units of dt after softplus; row 0 and local channels are
            -1. None switches the filter off.
        token_rows: (batch,) int32: each token's row, 0 for generated tokens; needed with ``dt_threshold``.
        out: (batch, d_inner) in ``x.dtype`` to write to. None allocates it.
        dt_weight: (d_inner, dt_rank) contiguous, for Mamba-1: dt is (batch, dt_rank), and ``dt @ dt_weight.T`` is what
            the rest of this text calls dt. It saves the launch of that product.
        check: False leaves the checks out, for a caller whose arguments of this layout have passed them before.

    Returns:
        ``out``, (batch, d_inner) in ``x.dtype``.

    Raises:
        ValueError: for a wrong shape, dtype, stride or device.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    arguments = (state, x, dt, A, B, C, D, z, dt_bias, state_indices, dt_threshold, token_rows, out, dt_weight)
    if check:
        _check(*arguments)
    if x.numel() == 0:
        return out
    if uses_triton(x):
        from .selective_state_update_triton import selective_state_update_triton

        selective_state_update_triton(*arguments)
    else:
        # in float32, as on a GPU
        out.copy_(selective_state_update_reference(state, x.float(), *arguments[2:-2], dt_weight=dt_weight))
    return out


def _check(
    state: torch.Tensor, x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor,
    D: torch.Tensor, z: torch.Tensor | None, dt_bias: torch.Tensor, state_indices: torch.Tensor,
    dt_threshold: torch.Tensor | None, token_rows: torch.Tensor | None, out: torch.Tensor,
    dt_weight: torch.Tensor | None,
) -> None:  # fmt: skip
    if x.dim() != 2 or state.dim() != 3 or A.dim() not in (1, 2):
        raise ValueError(
            "x must be (batch, d_inner), state (slots, d_inner, d_state) and A (d_inner, d_state) or (nheads,), "
            f"got {tuple(x.shape)}, {tuple(state.shape)} and {tuple(A.shape)}"
        )
    (batch, d_inner), d_state, device, float32 = x.shape, state.shape[2], x.device, (torch.float32,)
    channels = A.shape[0]
    if d_inner % max(channels, 1):
        raise ValueError(f"A must have one entry for each of the heads that share d_inner={d_inner}, got {channels}")
    for name, tensor in (("x", x), ("z", z), ("out", out)):
        if tensor is not None:
            check_tensor(name, tensor, (batch, d_inner), FLOATS, device, contiguous=False)
    if dt_weight is None:
        check_tensor("dt", dt, (batch, channels), FLOATS, device, contiguous=False)
    else:
        rank = dt.shape[-1]
        if A.dim() == 1:
            raise ValueError("dt_weight is for Mamba-1, whose A is (d_inner, d_state); leave it out for Mamba-2")
        check_tensor("dt", dt, (batch, rank), FLOATS, device, contiguous=False)
        check_tensor("dt_weight", dt_weight, (d_inner, rank), FLOATS, device)
    check_tensor("A", A, (d_inner, d_state) if A.dim() == 2 else (channels,), float32, device)
    if B.dim() != 2 or B.shape[1] % d_state or (A.dim() == 2 and B.shape[1] != d_state):
        raise ValueError(f"B must be (batch, ngroups * {d_state}), one group for Mamba-1, got {tuple(B.shape)}")
    for name, tensor in (("B", B), ("C", C)):
        check_tensor(name, tensor, (batch, B.shape[1]), FLOATS, device, contiguous=False)
    for name, tensor in (("D", D), ("dt_bias", dt_bias)):
        check_tensor(name, tensor, (channels,), FLOATS, device)
    check_tensor("state", state, (state.shape[0], d_inner, d_state), FLOATS, device, contiguous=False)
    if state.shape[0] and not state[0].is_contiguous():
        raise ValueError(f"each slot of state must be contiguous (d_inner, d_state), got strides {state.stride()}")
    if tuple(state_indices.shape) != (batch,) or state_indices.dtype != torch.int32 or state_indices.device != device:
        raise ValueError(
            f"state_indices must be ({batch},) int32 on {device}, got {tuple(state_indices.shape)} "
            f"{state_indices.dtype} on {state_indices.device}"
        )
    if dt_threshold is None:
        return
    if token_rows is None:
        raise ValueError("dt_threshold needs token_rows beside it, which came as None")
    rows = dt_threshold.shape[0] if dt_threshold.dim() == 2 else 1
    check_tensor("dt_threshold", dt_threshold, (rows, channels), float32, device)
    check_tensor("token_rows", token_rows, (batch,), (torch.int32,), device)
