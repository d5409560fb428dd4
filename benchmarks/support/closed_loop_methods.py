"""What closed_loop_research.py does with the dt and A of a layer; methods of the torch reference."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from vllm_longmamba.tables.closed_loop import budget_thresholds, combine_thresholds
from vllm_longmamba.torch_reference import LayerPlan, LayerView, LongMamba, Prompt, TorchModel


class Measuring:
    """A method that takes each layer's thresholds from the tokens that it reads, and applies them at once.

    Args:
        budgets: layer -> (channels,) float64; infinite in local channels.
        clamps: layer -> (channels,), dt above counts as this much; None without a clamp.
        combine: how to make one threshold of those of all sequences; None gives every sequence its own.
        soft: factor of a filtered token's dt.

    Attributes:
        found: layer -> (sequences, channels).
    """

    name = "measuring"
    needs_whole_prompt = True

    def __init__(self, budgets: dict[int, Any], clamps: Any, combine: str | None, soft: float) -> None:
        self.budgets, self.clamps, self.combine, self.soft = budgets, clamps, combine, soft
        self.found: dict[int, torch.Tensor] = {}

    def check(self, channels: Any) -> None:
        """Fits every model."""

    def plan(self, layer: LayerView, prompt: Prompt) -> LayerPlan:
        """Measure and filter."""
        dt = torch.cat([part.dt for part in layer.projections()], dim=1)
        if self.clamps is not None:
            dt = torch.minimum(dt, self.clamps[layer.index])
        budget = self.budgets[layer.index]
        mine = torch.isfinite(budget)
        each = torch.full((len(dt), len(budget)), -1.0, device=dt.device)
        each[:, mine] = torch.stack([budget_thresholds(sequence[:, mine], budget[mine]) for sequence in dt])
        self.found[layer.index] = each.cpu()
        used = each[:, None] if self.combine is None else combine_thresholds(each, self.combine)
        return LayerPlan(change_dt=lambda dt: torch.where(dt <= used, self.soft * dt, dt))


class Soft(LongMamba):
    """Filtered tokens keep a part of their dt."""

    soft = 0.0

    def plan(self, layer: LayerView, prompt: Prompt) -> LayerPlan:
        """Scale, where LongMamba sets 0."""
        plan = super().plan(layer, prompt)
        zeroed = plan.change_dt
        if zeroed is None or self.soft == 0:
            return plan
        return LayerPlan(change_dt=lambda dt: torch.maximum(zeroed(dt), self.soft * dt))


class Keeping:
    """Filters, and adds up what it keeps.

    Args:
        thresholds: layer -> (channels,).

    Attributes:
        found: layer -> (sequences, channels) float64, the sum of dt over the kept tokens.
    """

    name = "keeping"
    needs_whole_prompt = True

    def __init__(self, thresholds: Mapping[int, torch.Tensor]) -> None:
        self.thresholds = thresholds
        self.found: dict[int, torch.Tensor] = {}

    def check(self, channels: Any) -> None:
        """Fits every model."""

    def plan(self, layer: LayerView, prompt: Prompt) -> LayerPlan:
        """Measure and filter."""
        threshold = self.thresholds[layer.index].to(layer.A.device)
        sums = [torch.where(p.dt > threshold, p.dt, 0.0).sum(1, dtype=torch.float64) for p in layer.projections()]
        self.found[layer.index] = torch.stack(sums).sum(0).cpu()
        return LayerPlan(change_dt=lambda dt: dt.masked_fill(dt <= threshold, 0.0))


class ScaledDt:
    """All tokens' dt times a factor of the channel, in the input and in the decay, as in MambaExtend.

    Args:
        factors: layer -> (channels,).
    """

    name = "scaled-dt"
    needs_whole_prompt = False

    def __init__(self, factors: Mapping[int, torch.Tensor]) -> None:
        self.factors = factors

    def check(self, channels: Any) -> None:
        """Fits every model."""

    def plan(self, layer: LayerView, prompt: Prompt) -> LayerPlan:
        """Scale."""
        factor = self.factors[layer.index]
        return LayerPlan(change_dt=lambda dt: dt * factor)


def scale_decay(model: TorchModel, factors: Mapping[int, torch.Tensor]) -> TorchModel:
    """The same model with A times a factor of the channel, so the decay alone, as in Mamba Modulation.

    Args:
        model: stays as it is; all other weights are shared.
        factors: layer -> (channels,).
    """
    other = copy.copy(model)
    other.layers = []
    for layer in model.layers:
        mixer, factor = copy.copy(layer.mixer), factors[layer.index]
        mixer.A = mixer.A * (factor[:, None] if mixer.A.ndim == 2 else factor)
        other.layers.append(replace(layer, mixer=mixer))
    return other
