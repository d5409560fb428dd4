"""DeciMamba (arXiv 2406.14528): some layers drop the prompt tokens of small dt, for themselves and all layers after.

docs/decimamba.md says what the paper and its authors' code do, and where this differs.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from .plain import LayerPlan, LayerView, Prompt

# What the authors' configs all have.
MIN_TOKENS = 20


@dataclass(frozen=True)
class DeciMamba:
    """Decimating layer s (counted from 0) keeps the L_base * beta^s tokens of the largest dt.

    The last tokens of a prompt, whose outputs are asked for, are kept beside those: with one output, the last token.

    Attributes:
        layers: indices of the decimating layers, ascending.
        L_base: tokens that the first of them keeps.
        beta: share of them that each further one keeps, 0 < beta <= 1.
        min_tokens: no layer keeps fewer.
        score: "mean" of dt over the channels, as in the paper, or its "norm", as in its authors' code.

    Raises:
        ValueError: a setting outside its range.
    """

    layers: tuple[int, ...]
    L_base: int
    beta: float = 1.0
    min_tokens: int = MIN_TOKENS
    score: Literal["mean", "norm"] = "mean"

    name = "decimamba"
    needs_whole_prompt = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        if not self.layers or list(self.layers) != sorted(set(self.layers)) or self.layers[0] < 0:
            raise ValueError(f"DeciMamba.layers must be ascending indices, at least one, got {self.layers}")
        if self.L_base < 1 or self.min_tokens < 0:
            raise ValueError(
                "DeciMamba.L_base must be at least 1 token and min_tokens not negative, got "
                f"{self.L_base} and {self.min_tokens}"
            )
        if not 0.0 < self.beta <= 1.0:
            raise ValueError(f"DeciMamba.beta must lie in (0, 1], got {self.beta}")
        if self.score not in ("mean", "norm"):
            raise ValueError(f"DeciMamba.score must be 'mean' or 'norm', got {self.score!r}")

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values, from which `DeciMamba(**settings)` makes the same again."""
        return asdict(self) | {"layers": list(self.layers)}

    def check(self, channels: Mapping[int, int]) -> None:
        """See `ReadingMethod`."""
        if unknown := sorted(set(self.layers) - set(channels)):
            raise ValueError(f"DeciMamba.layers: the model has the layers {sorted(channels)}, but not {unknown}")

    def plan(self, layer: LayerView, prompt: Prompt) -> LayerPlan:
        """See `ReadingMethod`."""
        if layer.index not in self.layers:
            return LayerPlan()
        scores = torch.cat([self._scores(projection.dt[0]) for projection in layer.projections()])
        return LayerPlan(kept_tokens=keep_largest(scores, self.tokens_kept(layer.index), prompt.outputs))

    def tokens_kept(self, layer: int) -> int:
        """How many tokens a decimating layer keeps (P_s), beside the last ones."""
        return max(int(self.L_base * self.beta ** self.layers.index(layer)), self.min_tokens)

    def _scores(self, dt: torch.Tensor) -> torch.Tensor:
        """(tokens,) importance of the dt (tokens, channels)."""
        return dt.mean(-1) if self.score == "mean" else torch.linalg.vector_norm(dt, dim=-1)


def keep_largest(scores: torch.Tensor, count: int, always: int) -> torch.Tensor:
    """Choose the tokens that stay.

    Args:
        scores: (tokens,).
        count: how many of the largest to keep among the first `tokens - always`; all where there are no more.
        always: last tokens that stay in any case and are not counted.

    Returns:
        (kept,) int64 indices, ascending.
    """
    tokens = scores.shape[0]
    before = max(tokens - always, 0)
    largest = torch.topk(scores[:before], min(count, before)).indices.sort().values
    return torch.cat([largest, torch.arange(before, tokens, device=scores.device)])
