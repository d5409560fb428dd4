"""The small parts of a Mamba layer."""

import torch
from torch.nn import functional


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension, times `weight` where there is one."""
    return functional.rms_norm(x, (x.shape[-1],), weight, eps)


def gated_rms_norm(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float, ngroups: int) -> torch.Tensor:
    """Mamba-2's norm: x * silu(gate), normalised in each of `ngroups` groups of channels, times `weight`.

    Args:
        x, gate: (..., d_inner).
        weight: (d_inner,).
    """
    gated = x * functional.silu(gate)
    return rms_norm(torch.unflatten(gated, -1, (ngroups, -1)), None, eps).flatten(-2) * weight


def causal_conv1d(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, history: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Depthwise convolution and silu; a token sees itself and the d_conv - 1 tokens before it.

    Args:
        x: (batch, tokens, channels).
        weight: (channels, d_conv).
        bias: (channels,).
        history: (batch, d_conv - 1, channels), what came before x.

    Returns:
        (batch, tokens, channels), and the history for the tokens that follow.
    """
    tokens, d_conv = x.shape[1], weight.shape[1]
    padded = torch.cat([history, x], dim=1)
    y = padded[:, :tokens] * weight[:, 0]
    for tap in range(1, d_conv):
        y.addcmul_(padded[:, tap : tap + tokens], weight[:, tap])
    if bias is not None:
        y += bias
    # A copy: the view would keep all of `padded` alive.
    return functional.silu(y, inplace=True), padded[:, tokens:].clone()


def softplus(x: torch.Tensor) -> torch.Tensor:
    """log(1 + exp(x)), and x itself above 20, as in the Mamba kernels; 0 for -inf."""
    return functional.softplus(x, threshold=20.0)


def inverse_softplus(y: torch.Tensor) -> torch.Tensor:
    """The x whose softplus is y >= 0; -inf for 0."""
    return torch.where(y > 20.0, y, torch.expm1(y.clamp(max=20.0)).log())
