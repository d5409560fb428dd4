"""Mamba-2's gate and norm, in the form whose last factor is applied behind the output projection."""

import torch
from torch.nn import functional

from .dispatch import check_tensor, uses_triton

FLOATS = (torch.bfloat16, torch.float32)


def gated_norm_(y: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, eps: float, row_scale: torch.Tensor) -> None:
    """Replace ``y`` by ``g * weight``, ``g = y * silu(z)``, and write each row's ``rsqrt(mean(g * g) + eps)`` beside.

    RMSNorm is their product. Since a linear layer without a bias takes a row's factor in front or behind, the kernel
    that computes ``y`` may write ``g * weight`` before it knows the factor; here it is done to rows that exist already.
    Mamba-2 (arXiv 2405.21060), section 7.

    Args:
        y: (tokens, d_inner) bfloat16 or float32; last stride 1, any row stride. Changed in place.
        z: (tokens, d_inner), the gate.
        weight: (d_inner,) contiguous, of the norm.
        eps: of the norm.
        row_scale: (tokens, 2) in ``y.dtype``, written: the sum of both columns is the factor, to 16 bits in bfloat16.

    Raises:
        ValueError: for a wrong shape, dtype, stride or device.
    """
    check_gated_norm(y, z, weight, row_scale)
    if y.numel() == 0:
        return
    if uses_triton(y):
        from .gated_norm_triton import gated_norm_triton_

        gated_norm_triton_(y, z, weight, eps, row_scale)
        return
    gated, factor = gated_norm_reference(y.float(), z, weight, eps)
    y.copy_(gated)
    row_scale[:, 0] = factor
    row_scale[:, 1] = factor - row_scale[:, 0].to(factor.dtype)


def gated_norm_reference(
    y: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`gated_norm_`: ``g * weight`` (tokens, d_inner) and the factor of each row (tokens,)."""
    gated = y * functional.silu(z.to(y.dtype))
    return gated * weight.to(y.dtype), torch.rsqrt(gated.square().mean(-1) + eps)


def check_gated_norm(y: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, row_scale: torch.Tensor) -> None:
    """Check the arguments of `gated_norm_`.

    Raises:
        ValueError: naming the argument and the rule.
    """
    check_tensor("y", y, tuple(y.shape[:1]) + tuple(weight.shape), FLOATS, y.device, contiguous=False)
    check_tensor("z", z, tuple(y.shape), FLOATS, y.device, contiguous=False)
    check_tensor("weight", weight, tuple(weight.shape), FLOATS, y.device)
    check_tensor("row_scale", row_scale, (len(y), 2), (y.dtype,), y.device, contiguous=False)
