"""Tiny models, settings of DeciMamba for them, and what the torch reference expects of both."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import tiny_models
import torch
from references.torch_models import DeciMamba, LayerPlan, LayerView, Plain, Prompt, ReadingMethod, TorchModel
from references.torch_models.methods.decimamba import keep_largest
from tiny_models import random_token_ids


class TooCloseError(AssertionError):
    """Rounding could turn the choice over: take another prompt."""


@dataclass(frozen=True)
class CheckedDeciMamba(DeciMamba):
    """Fails for a prompt with two tokens that nearly are equally large, of which one is kept.

    Attributes:
        least_gap: relative distance of their scores; float32 moves them by some 1e-6.
    """

    least_gap: float = 1e-5

    def plan(self, layer: LayerView, prompt: Prompt) -> LayerPlan:
        plan = super().plan(layer, prompt)
        if plan.kept_tokens is not None:
            scores = torch.cat([self._scores(part.dt[0]) for part in layer.projections()])[: -prompt.outputs]
            self.check_gap(scores, self.tokens_kept(layer.index))
        return plan

    def check_gap(self, scores: torch.Tensor, count: int) -> None:
        """Fails if the last of the `count` that stay and the first that does not are too close."""
        ordered = scores.sort(descending=True).values
        if 0 < count < len(ordered):
            gap = float((ordered[count - 1] - ordered[count]) / ordered[count])
            if gap < self.least_gap:
                raise TooCloseError(f"take another prompt, the gap is {gap:.1e}")


@dataclass(frozen=True)
class CutDeciMamba(CheckedDeciMamba):
    """Chooses in each part of a prompt for itself, as an engine with `cut_prompts` does.

    Attributes:
        ends: of the parts, in tokens of the prompt.
    """

    ends: tuple[int, ...] = ()

    def plan(self, layer: LayerView, prompt: Prompt) -> LayerPlan:
        if layer.index not in self.layers:
            return LayerPlan()
        scores = torch.cat([self._scores(part.dt[0]) for part in layer.projections()])
        kept, start = [], 0
        for end in self.ends:
            before, after = self._left(prompt, end)[self.layers.index(layer.index) :][:2]
            always = int(end == prompt.length)
            part = scores[start : start + before]
            self.check_gap(part[: before - always], after - always)
            kept.append(start + keep_largest(part, after - always, always))
            start += before
        assert start == len(scores)
        return LayerPlan(kept_tokens=torch.cat(kept))

    def _left(self, prompt: Prompt, end: int) -> list[int]:
        """Tokens of the part that ends here, in front of the first decimating layer and behind each."""
        begin, droppable = max([0, *(other for other in self.ends if other < end)]), prompt.length - 1
        totals = [droppable, *map(self.tokens_kept, self.layers)]
        shares = [Fraction(later, earlier) for earlier, later in pairwise(totals)]

        def read(place: int) -> list[int]:
            counts = [min(place, droppable)]
            for share in shares:
                counts.append(ceil(counts[-1] * share))
            return counts

        always = int(end == prompt.length)
        return [max(there - here + always, 1) for here, there in zip(read(begin), read(end), strict=True)]


@dataclass(frozen=True)
class Case:
    """A model and settings for it.

    Attributes:
        write: makes the checkpoint; takes a folder and `model`.
        model: further arguments.
        settings: of DeciMamba. Not layer 0 of a Mamba-2: there equal tokens have equal dt.
    """

    write: Callable[..., Path]
    model: dict[str, Any]
    settings: dict[str, Any]

    @property
    def arguments(self) -> dict[str, Any]:
        """For vLLM."""
        return {"model_impl": "decimamba", "additional_config": {"decimamba": self.settings}}

    def prompts(self) -> list[list[int]]:
        """Prompts that are not decimated, that lose one token, and that lose most."""
        L_base = self.settings["L_base"]
        lengths = (1, 5, L_base, L_base + 1, L_base + 2, 3 * L_base, 451)
        return [random_token_ids(length, seed=length) for length in lengths]

    def logprobs(
        self, folder: Path, prompt: list[int], generated: list[int], ends: Sequence[int] | None = None
    ) -> np.ndarray:
        """(1 + generated, vocabulary) float32, after the prompt's last token and after each generated one.

        Args:
            folder: of the checkpoint.
            prompt: its tokens.
            generated: tokens behind it.
            ends: of the parts that the prompt was cut into; None for a whole one.
        """
        method: ReadingMethod = Plain()
        if len(prompt) > self.settings["L_base"] + 1:
            method = CheckedDeciMamba(**self.settings)
            if ends is not None:
                method = CutDeciMamba(**self.settings, ends=tuple(ends))
        reading = TorchModel(folder, method, device="cpu").read([prompt])
        logits = [reading.logits[0], *(reading.append(torch.tensor([[token]]))[0] for token in generated)]
        return torch.cat(logits).log_softmax(-1).numpy()


CASES = {
    "mamba1": Case(
        tiny_models.write_mamba1_original, {}, {"layers": [0, 1], "L_base": 100, "beta": 0.5, "min_tokens": 3}
    ),
    "mamba2": Case(
        tiny_models.write_mamba2_original,
        {"n_layer": 6},
        {"layers": [1, 2, 4], "L_base": 90, "beta": 0.6, "min_tokens": 40, "score": "norm"},
    ),
    "falcon_mamba": Case(tiny_models.write_falcon_mamba, {}, {"layers": [1], "L_base": 50}),
}
