"""The dt's that the torch reference reads."""

from collections.abc import Mapping

import torch

from vllm_longmamba.torch_reference import LayerPlan, LayerView, Prompt


class Recording:
    """A method that keeps the dt's of what is read."""

    name = "recording"
    needs_whole_prompt = False

    def __init__(self) -> None:
        self._dt: dict[int, list[torch.Tensor]] = {}

    def check(self, channels: Mapping[int, int]) -> None:
        """Fits every model."""

    def plan(self, layer: LayerView, prompt: Prompt) -> LayerPlan:
        """Keeps, and changes nothing."""
        self._dt.setdefault(layer.index, []).extend(part.dt[0] for part in layer.projections())
        return LayerPlan()

    def take(self) -> dict[int, torch.Tensor]:
        """Layer -> (tokens, channels) of one text; forgotten afterwards."""
        recorded = {index: torch.cat(parts) for index, parts in self._dt.items()}
        self._dt.clear()
        return recorded
