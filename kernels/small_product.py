"""Decode: a few tokens times a large weight, with what stands in front of it or follows it in the same launch."""

import torch

from .causal_conv1d_update import check_arguments as check_convolution
from .dispatch import FLOATS, check_tensor, supports_dependent_launch, uses_triton
from .reference import causal_conv1d_update_reference, small_product_reference

# Tokens for which it pays, by the most features of the weight, on an H200: benchmarks/small_products.py.
MOST_TOKENS = {1024: 4, 4096: 2}
# `small_product` takes no more.
MOST_SMALL = max(MOST_TOKENS.values())
# Numbers of a weight; larger ones were not measured.
MOST_WEIGHT = 1 << 25


def most_small_tokens(weight: torch.Tensor) -> int:
    """Up to how many tokens `small_product` is faster than the vendor's library; 0 where it never is.

    Args:
        weight: (N, K). The kernel reads it while the one in front of it ends, which not every GPU can.
    """
    if weight.numel() > MOST_WEIGHT or not supports_dependent_launch(weight.device):
        return 0
    return next((most for limit, most in MOST_TOKENS.items() if weight.shape[0] <= limit), 1)


def small_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    gate: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    eps: float = 1e-5,
    out: torch.Tensor | None = None,
    conv_weight: torch.Tensor | None = None,
    conv_bias: torch.Tensor | None = None,
    conv_state: torch.Tensor | None = None,
    state_indices: torch.Tensor | None = None,
    silu: bool = True,
) -> torch.Tensor:
    """Compute ``x @ weight.T``, or ``rms_norm(x * silu(gate)) * norm_weight @ weight.T``; sums in float32.

    With a convolution, the first of its N results, one for each channel, go through
    :func:`kernels.causal_conv1d_update.causal_conv1d_update` as Mamba-1's do.

    The launch depends on shapes only, so a CUDA graph may capture it. Mamba-2 (arXiv 2405.21060) has the norm in front
    of its last projection, section 7.

    Args:
        x: (tokens, K), 1 to MOST_SMALL tokens; like gate and out with last stride 1 and any row stride.
        weight: (N, K) contiguous.
        gate: (tokens, K), or None for neither gate nor norm.
        norm_weight: (K,) contiguous, needed with a gate.
        eps: added to the mean of squares.
        out: (tokens, N) in ``x.dtype`` to write to. None allocates it.
        conv_weight: (channels, width) contiguous, or None for no convolution; at most N channels.
        conv_bias, conv_state, state_indices, silu: as in `causal_conv1d_update`; the state is updated in place.

    Returns:
        ``out``, (tokens, N) in ``x.dtype``.

    Raises:
        ValueError: for a wrong shape, dtype, stride or device.
    """
    _check(x, weight, gate, norm_weight)
    if any((tensor is None) != (conv_weight is None) for tensor in (conv_state, state_indices)):
        raise ValueError("conv_weight, conv_state and state_indices belong together, but some of them came as None")
    shape = (len(x), len(weight))
    out = torch.empty(shape, dtype=x.dtype, device=x.device) if out is None else out
    check_tensor("out", out, shape, (x.dtype,), x.device, contiguous=False)
    convolution = None
    if conv_weight is not None and conv_state is not None and state_indices is not None:
        inputs = out[:, : len(conv_weight)]
        check_convolution(inputs, conv_weight, conv_bias, conv_state, state_indices, inputs)
        convolution = (conv_weight, conv_bias, conv_state, state_indices, silu)
    if uses_triton(x):
        from .small_product_triton import small_product_triton

        small_product_triton(x, weight, gate, norm_weight, eps, out, convolution)
        return out
    # in float32, as on a GPU
    out.copy_(small_product_reference(x.float(), weight, gate, norm_weight, eps))
    if convolution is not None:
        inputs.copy_(causal_conv1d_update_reference(inputs.float(), *convolution))
    return out


def _check(x: torch.Tensor, weight: torch.Tensor, gate: torch.Tensor | None, norm_weight: torch.Tensor | None) -> None:
    if x.dim() != 2 or weight.dim() != 2 or not 0 < len(x) <= MOST_SMALL:
        raise ValueError(
            f"x must be (1 to {MOST_SMALL} tokens, K) and weight (N, K), got {tuple(x.shape)} and "
            f"{tuple(weight.shape)}; use torch.nn.functional.linear for more tokens"
        )
    (features, inputs), device = weight.shape, x.device
    check_tensor("x", x, (len(x), inputs), FLOATS, device, contiguous=False)
    check_tensor("weight", weight, (features, inputs), FLOATS, device)
    if (gate is None) != (norm_weight is None):
        raise ValueError("gate and norm_weight belong together, but one of them came as None")
    if gate is not None and norm_weight is not None:
        check_tensor("gate", gate, (len(x), inputs), FLOATS, device, contiguous=False)
        check_tensor("norm_weight", norm_weight, (inputs,), FLOATS, device)
