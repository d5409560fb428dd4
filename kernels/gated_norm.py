"""The gate and the norm behind the SSM of a Mamba-2 layer, in one launch."""

import torch

from .dispatch import FLOATS, check_tensor, uses_triton
from .reference import gated_norm_reference


def gated_norm(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-5,
    out: torch.Tensor | None = None,
    check: bool = True,
) -> torch.Tensor:
    """Compute ``rms_norm(x * silu(gate)) * weight`` for each token; sums in float32.

    The launch depends on shapes only, so a CUDA graph may capture it. Mamba-2 (arXiv 2405.21060), section 7.

    Args:
        x: (tokens, channels); like gate and out with last stride 1 and any row stride.
        gate: (tokens, channels).
        weight: (channels,) contiguous.
        eps: added to the mean of squares.
        out: (tokens, channels) in ``x.dtype`` to write to; may be ``x`` itself. None allocates it.
        check: False leaves the checks out, for a caller whose arguments of this layout have passed them before.

    Returns:
        ``out``, (tokens, channels) in ``x.dtype``.

    Raises:
        ValueError: for a wrong shape, dtype, stride or device.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    if check:
        _check(x, gate, weight, out)
    if x.numel() == 0:
        return out
    if uses_triton(x):
        from .gated_norm_triton import gated_norm_triton

        gated_norm_triton(x, gate, weight, eps, out)
        return out
    # in float32, as on a GPU
    return out.copy_(gated_norm_reference(x.float(), gate, weight, eps))


def _check(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    if x.dim() != 2:
        raise ValueError(f"x must be (tokens, channels), got {tuple(x.shape)}")
    shape, device = tuple(x.shape), x.device
    check_tensor("x", x, shape, FLOATS, device, contiguous=False)
    check_tensor("gate", gate, shape, FLOATS, device, contiguous=False)
    check_tensor("weight", weight, shape[1:], FLOATS, device)
    check_tensor("out", out, shape, (x.dtype,), device, contiguous=False)
