"""The Mamba mean distance of a model's layers (arXiv 2406.14528, Eq. 10): how far back a text's last token looks."""

from collections.abc import Mapping, Sequence

import torch

from vllm_longmamba.inspect.hidden_attention import LayerInputs, mean_distance

from .methods import LayerPlan, LayerView, Prompt
from .model import TorchModel


def mean_distances(model: TorchModel, tokens: Sequence[int]) -> dict[int, torch.Tensor]:
    """The mean distance in every channel of every layer of the plain model.

    Args:
        model: its method does not count.
        tokens: a text.

    Returns:
        Layer index -> (channels,) float64 on the CPU, in tokens, between 0 and the text's last index.
    """
    measure = _Measure()
    model.with_method(measure).read([tokens])
    return measure.distances


def choose_layers(distances: Mapping[int, torch.Tensor], number: int, first: int = 0) -> tuple[int, ...]:
    """The layers that look furthest back, which is where DeciMamba is to decimate.

    Args:
        distances: as from `mean_distances`; a layer's distance is the mean over its channels.
        number: how many layers.
        first: no layer before this one.

    Returns:
        Layer indices, ascending.

    Raises:
        ValueError: fewer than `number` layers from `first` on.
    """
    means = {layer: float(distance.mean()) for layer, distance in distances.items() if layer >= first}
    if not 1 <= number <= len(means):
        raise ValueError(
            f"choose_layers: number must lie between 1 and {len(means)}, the layers from {first} on, got {number}"
        )
    return tuple(sorted(sorted(means, key=lambda layer: (-means[layer], layer))[:number]))


class _Measure:
    """A method that only looks."""

    name = "mean_distance"
    needs_whole_prompt = True

    def __init__(self) -> None:
        self.distances: dict[int, torch.Tensor] = {}

    def check(self, channels: Mapping[int, int]) -> None:
        """Fits every model."""

    def plan(self, layer: LayerView, prompt: Prompt) -> LayerPlan:
        """Measures a layer."""
        parts = [(part.dt[0], part.B[0], part.C[0]) for part in layer.projections()]
        dt, B, C = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        if layer.A.dim() == 2:
            # Mamba-1 has one group.
            inputs = LayerInputs(dt, layer.A, B[:, None], C[:, None])
        else:
            inputs = LayerInputs(dt, layer.A[:, None], B, C)
        self.distances[layer.index] = mean_distance(inputs, list(range(inputs.channels))).cpu()
        return LayerPlan()
