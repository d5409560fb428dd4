"""Decode: one token of the short causal convolution in front of every Mamba layer."""

import torch

from .dispatch import FLOATS, check_tensor, uses_triton
from .reference import causal_conv1d_update_reference


def causal_conv1d_update(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    conv_state: torch.Tensor,
    state_indices: torch.Tensor,
    silu: bool = True,
    out: torch.Tensor | None = None,
    check: bool = True,
) -> torch.Tensor:
    """Run ``out = silu(bias + sum_k weight[:, k] * inputs[k])`` for one token of each sequence of a batch.

    ``inputs`` are the last ``width - 1`` tokens, from the sequence's slot of ``conv_state``, and then ``x``. In
    float32. The launch depends on shapes only and nothing is read back, so a CUDA graph may capture it.

    Args:
        x: (batch, channels), last stride 1, any row stride.
        weight: (channels, width) contiguous, width at least 2.
        bias: (channels,) contiguous, or None.
        conv_state: (slots, channels, width - 1), any strides. Updated in place: moved by one token.
        state_indices: (batch,) int32, any stride: each sequence's slot. 0 is vLLM's NULL block: such a row is padding,
            its state is left alone, and its row of ``out`` is finite for a finite ``x`` but means nothing.
        silu: False leaves the activation out.
        out: (batch, channels) in ``x.dtype`` to write to, not ``x`` itself. None allocates it.
        check: False leaves the checks out, for a caller whose arguments of this layout have passed them before.

    Returns:
        ``out``, (batch, channels) in ``x.dtype``.

    Raises:
        ValueError: for a wrong shape, dtype, stride or device.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    arguments = (x, weight, bias, conv_state, state_indices)
    if check:
        check_arguments(*arguments, out)
    if x.numel() == 0:
        return out
    if uses_triton(x):
        from .causal_conv1d_update_triton import causal_conv1d_update_triton

        causal_conv1d_update_triton(*arguments, silu, out)
    else:
        # in float32, as on a GPU
        out.copy_(causal_conv1d_update_reference(x.float(), *arguments[1:], silu))
    return out


def check_arguments(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, conv_state: torch.Tensor,
    state_indices: torch.Tensor, out: torch.Tensor,
) -> None:  # fmt: skip
    """Those of `causal_conv1d_update`; raises ValueError as it does."""
    if x.dim() != 2 or weight.dim() != 2 or conv_state.dim() != 3 or weight.shape[1] < 2:
        raise ValueError(
            "x must be (batch, channels), weight (channels, width >= 2) and conv_state (slots, channels, width - 1), "
            f"got {tuple(x.shape)}, {tuple(weight.shape)} and {tuple(conv_state.shape)}"
        )
    (batch, channels), width, device = x.shape, weight.shape[1], x.device
    check_tensor("x", x, (batch, channels), FLOATS, device, contiguous=False)
    check_tensor("out", out, (batch, channels), (x.dtype,), device, contiguous=False)
    check_tensor("weight", weight, (channels, width), FLOATS, device)
    if bias is not None:
        check_tensor("bias", bias, (channels,), FLOATS, device)
    if tuple(conv_state.shape[1:]) != (channels, width - 1) or conv_state.device != device:
        raise ValueError(
            f"conv_state must be (slots, {channels}, {width - 1}) on {device}, "
            f"got {tuple(conv_state.shape)} on {conv_state.device}"
        )
    if tuple(state_indices.shape) != (batch,) or state_indices.dtype != torch.int32 or state_indices.device != device:
        raise ValueError(
            f"state_indices must be ({batch},) int32 on {device}, got {tuple(state_indices.shape)} "
            f"{state_indices.dtype} on {state_indices.device}"
        )
