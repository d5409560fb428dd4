"""The plain model, and what every method is to a model."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from ..mixers import Projection


@dataclass(frozen=True)
class Prompt:
    """A prompt, or several of one length that are read together.

    Attributes:
        length: all its tokens (S), also where only a part is read now.
        outputs: its last tokens whose outputs are asked for.
    """

    length: int
    outputs: int


@dataclass(frozen=True)
class LayerView:
    """A layer about to read tokens.

    Attributes:
        index: which layer.
        A: (channels, d_state) in Mamba-1, (channels,) in Mamba-2; negative.
        projections: runs the layer's projections over these tokens, segment by segment; nothing is kept of it, and
            the layer runs them again afterwards. Spans the whole prompt where `needs_whole_prompt`.
    """

    index: int
    A: torch.Tensor
    projections: Callable[[], Iterator[Projection]]


@dataclass(frozen=True)
class LayerPlan:
    """What a method does in a layer. The default is nothing.

    Attributes:
        change_dt: from the dt (batch, tokens, channels) of prompt tokens to another one, without changing it in place.
        unfiltered_end: as many of the prompt's last tokens keep their dt.
        kept_tokens: (kept,) int64, ascending: the others are dropped, from this layer's recurrence on. None keeps all.
    """

    change_dt: Callable[[torch.Tensor], torch.Tensor] | None = None
    unfiltered_end: int = 0
    kept_tokens: torch.Tensor | None = None


class ReadingMethod(Protocol):
    """A method. It acts on prompt tokens only; generated ones run through the plain layers.

    Attributes:
        name: one word.
        needs_whole_prompt: a layer reads the whole prompt before the next one does, one prompt at a time.
    """

    name: str
    needs_whole_prompt: bool

    def check(self, channels: Mapping[int, int]) -> None:
        """Refuse a model that the method does not fit.

        Args:
            channels: layer index -> channels.

        Raises:
            ValueError: it does not.
        """

    def plan(self, layer: LayerView, prompt: Prompt) -> LayerPlan:
        """What to do in a layer, for the tokens that it is about to read."""


class Plain:
    """The model as it is."""

    name = "plain"
    needs_whole_prompt = False

    def check(self, channels: Mapping[int, int]) -> None:
        """Fits every model."""

    def plan(self, layer: LayerView, prompt: Prompt) -> LayerPlan:
        """Nothing."""
        return LayerPlan()
