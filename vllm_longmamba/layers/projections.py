"""The products of a layer with its weights: this project's kernel for the few tokens of a decode step, else vLLM's."""

from typing import Any, NamedTuple

import torch
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)

from vllm_longmamba.kernels import MOST_SMALL, compile_ahead, gated_norm, most_small_tokens, small_product


class GatedNorm(NamedTuple):
    """A norm in front of a product: ``rms_norm(x * silu(gate)) * weight``, with gate (tokens, K) and weight (K,)."""

    gate: torch.Tensor
    weight: torch.Tensor
    eps: float


NO_NORM = (None, None, 0.0)


def unquantized_weight(layer: Any) -> torch.Tensor | None:
    """The weight (N, K) of a layer that multiplies by it as it is: on a GPU, without quantization or LoRA."""
    if type(layer) not in (ColumnParallelLinear, MergedColumnParallelLinear, RowParallelLinear):
        return None
    if not isinstance(layer.quant_method, UnquantizedLinearMethod):
        return None
    weight: torch.Tensor = layer.weight
    return weight if weight.is_cuda else None


def plain_weight(layer: Any) -> torch.Tensor | None:
    """The same of a layer that does no more than that: it adds no bias, and nothing of other ranks."""
    weight = unquantized_weight(layer)
    if weight is None or layer.bias is not None:
        return None
    return None if type(layer) is RowParallelLinear and layer.tp_size > 1 else weight


def is_small(layer: Any, tokens: int) -> bool:
    """Whether `project` runs this project's kernel, the only way in which it takes a convolution."""
    weight = plain_weight(layer)
    return weight is not None and _are_few(tokens, weight)


def _are_few(tokens: int, weight: torch.Tensor) -> bool:
    # The first answer spares long prompts the second one.
    return bool(0 < tokens <= MOST_SMALL and tokens <= most_small_tokens(weight))


def project(
    layer: Any,
    x: torch.Tensor,
    out: torch.Tensor | None = None,
    norm: GatedNorm | None = None,
    check: bool = True,
    **convolution: Any,
) -> torch.Tensor:
    """Apply one of vLLM's linear layers without a bias.

    Args:
        layer: K to N features.
        x: (tokens, K).
        out: (tokens, N) to write to, or None.
        norm: in front of the product.
        check: False leaves the norm's checks out, for a layer that has passed them before.
        convolution: behind it, as `small_product` takes it; only where `is_small`.

    Returns:
        (tokens, N), ``out`` where given.
    """
    weight = plain_weight(layer)
    if weight is not None:
        # vLLM's parameters answer every question in Python, which takes time.
        weight = weight.data
    projected: torch.Tensor
    if weight is not None and _are_few(x.shape[0], weight):
        projected = small_product(x, weight, *(norm or NO_NORM), out, **convolution)
        return projected
    if norm is not None:
        x = gated_norm(x, *norm, check=check)
    if weight is not None:
        projected = torch.mm(x, weight.t(), out=out)
        return projected
    projected = layer(x)[0]
    return projected if out is None else out.copy_(projected)


def compile_product(layer: Any, norm: GatedNorm | None = None, **convolution: Any) -> None:
    """Start to compile this project's kernel for `project`, where it would run."""
    weight = plain_weight(layer)
    if weight is None or not (most := most_small_tokens(weight)):
        return
    gate, norm_weight, _ = norm or NO_NORM
    arguments = {"x": weight.new_empty((1, weight.shape[1])), "weight": weight, "gate": gate}
    arguments |= {"norm_weight": norm_weight, **convolution}
    compile_ahead(small_product, arguments, most, ("x", "gate", "state_indices"))
