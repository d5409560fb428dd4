"""The norms of dt, B and C in the Mamba-1 layers of Falcon Mamba and Jamba, in one launch."""

import torch

from .dispatch import FLOATS, check_tensor, uses_triton
from .reference import norm_parts_reference


def norm_parts_(
    x: torch.Tensor,
    rank: int,
    eps: float = 1e-6,
    dt_weight: torch.Tensor | None = None,
    B_weight: torch.Tensor | None = None,
    C_weight: torch.Tensor | None = None,
    check: bool = True,
) -> torch.Tensor:
    """Compute ``rms_norm(part) * weight`` of each token's dt, B and C, in place; sums in float32.

    The launch depends on shapes only, so a CUDA graph may capture it. Falcon Mamba (arXiv 2410.05355), section 2.

    Args:
        x: (tokens, rank + 2 * d_state), what the layer's x_proj gives: dt, B and C side by side; last stride 1, any
            row stride.
        rank: numbers of dt in front of its projection.
        eps: added to the mean of squares.
        dt_weight: (rank,) contiguous; None for 1, then the others are None, too.
        B_weight, C_weight: (d_state,) contiguous.
        check: False leaves the checks out, for a caller whose arguments of this layout have passed them before.

    Returns:
        ``x``.

    Raises:
        ValueError: for a wrong shape, dtype, stride or device.
    """
    d_state, weights = (x.shape[-1] - rank) // 2, (dt_weight, B_weight, C_weight)
    if check:
        _check(x, rank, d_state, weights)
    if x.numel() == 0:
        return x
    if uses_triton(x):
        from .norm_parts_triton import norm_parts_triton

        norm_parts_triton(x, rank, d_state, eps, *weights)
        return x
    # in float32, as on a GPU
    return x.copy_(norm_parts_reference(x.float(), rank, eps, *weights))


def _check(x: torch.Tensor, rank: int, d_state: int, weights: tuple[torch.Tensor | None, ...]) -> None:
    if x.dim() != 2 or rank < 1 or d_state < 1 or rank + 2 * d_state != x.shape[1]:
        raise ValueError(f"x must be (tokens, rank + 2 * d_state) with rank {rank}, got {tuple(x.shape)}")
    check_tensor("x", x, tuple(x.shape), FLOATS, x.device, contiguous=False)
    if any(weight is None for weight in weights) and not all(weight is None for weight in weights):
        raise ValueError("dt_weight, B_weight and C_weight must be given together")
    sizes = (rank, d_state, d_state)
    for name, weight, size in zip(("dt_weight", "B_weight", "C_weight"), weights, sizes, strict=True):
        if weight is not None:
            check_tensor(name, weight, (size,), FLOATS, x.device)
