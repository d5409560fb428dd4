"""Mean distances of a model's layers, and the layers chosen by them."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from tiny_models import random_token_ids
from torch_models import (
    LayerPlan,
    LayerView,
    LongMamba,
    Prompt,
    TorchModel,
    choose_layers,
    mean_distances,
)
from torch_models.mixers import Projection

Tiny = Callable[[str], Path]


class Catch:
    """Keeps the projections of every layer."""

    name = "catch"
    needs_whole_prompt = True

    def __init__(self) -> None:
        self.seen: dict[int, tuple[torch.Tensor, Projection]] = {}

    def check(self, channels: Mapping[int, int]) -> None:
        pass

    def plan(self, layer: LayerView, prompt: Prompt) -> LayerPlan:
        (self.seen[layer.index],) = [(layer.A, projection) for projection in layer.projections()]
        return LayerPlan()


def distance_by_loop(A: torch.Tensor, projection: Projection, channel: int) -> float:
    """Equation 10, one token after the other."""
    dt = projection.dt[0, :, channel].double()
    B, C = projection.B[0].double(), projection.C[0].double()
    if A.dim() == 1:
        # One group in this model.
        B, C = B[:, 0], C[:, 0]
    last, top, bottom = len(dt) - 1, 0.0, 0.0
    for token in range(len(dt)):
        decay = (A[channel].double() * dt[token + 1 :].sum()).exp()
        weight = abs(float((C[last] * decay * B[token]).sum() * dt[token]))
        top += (last - token) * weight
        bottom += weight
    return top / bottom


@pytest.mark.parametrize("name", ["mamba1", "mamba2"])
def test_mean_distances(tiny: Tiny, name: str) -> None:
    tokens = random_token_ids(37, seed=6)
    catch = Catch()
    model = TorchModel(tiny(name), catch, device="cpu")
    model.read([tokens])
    # The method of the model does not count, nor do the segments.
    filtered = model.with_method(LongMamba.from_thresholds({0: torch.full((model.channels[0],), 9.0)}))
    filtered.segment_tokens = 10
    distances = mean_distances(filtered, tokens)
    assert distances.keys() == catch.seen.keys() == {0, 1, 2}
    for layer, (A, projection) in catch.seen.items():
        expected = [distance_by_loop(A, projection, channel) for channel in range(A.shape[0])]
        torch.testing.assert_close(distances[layer], torch.tensor(expected).double(), rtol=1e-4, atol=1e-4)


def test_choose_layers() -> None:
    means = {0: 9.0, 1: 2.0, 2: 5.0, 3: 5.0, 4: 7.0}
    distances = {layer: torch.tensor([mean - 1, mean + 1]) for layer, mean in means.items()}
    assert choose_layers(distances, 2) == (0, 4)
    assert choose_layers(distances, 2, first=1) == (2, 4)
    assert choose_layers(distances, 3, first=1) == (2, 3, 4)
    for number, first in ((0, 0), (4, 2), (1, 5)):
        with pytest.raises(ValueError, match="number must lie between"):
            choose_layers(distances, number, first=first)
