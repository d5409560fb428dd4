"""The haystacks of `evidence_numbers.py`: windows of text, and what becomes of their digits."""

from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property

import torch

from vllm_longmamba.evaluate.texts import Encoder

from .evidence_plan import read_settings
from .evidence_texts import Texts

_TEXTS = read_settings()["texts"]
# Kinds of documents, by the rules of evidence.py.
DOCUMENTS = {kind: _TEXTS[kind] for kind in ("novels", "numbers")}
# Tokens of a window, and how far apart windows may begin.
WINDOW, STRIDE = 16384, 2048
# Digits in 1,000 tokens that a window of "numbers" has at least; the other windows of these documents are another kind.
MANY_DIGITS = _TEXTS["numbers"]["piece"]["least_digits"]
FEW = "few "


@dataclass(frozen=True)
class Haystack:
    """What the model reads in a part of the haystack.

    Attributes:
        kind: of text: "novels", "numbers" or "few numbers".
        digits: "" as they are; "letters" in their place; "added": the digits of "numbers" at their places.
        writes, decays: whether digits write into the state of global channels and let it decay. With neither, their dt
            there is 0.
    """

    kind: str = "numbers"
    digits: str = ""
    writes: bool = True
    decays: bool = True


class Windows:
    """Windows of text as a haystack has them.

    Args:
        encoder: of the model.
        texts: of both kinds of documents.
        number: of windows; they lie evenly over all of a kind.
    """

    def __init__(self, encoder: Encoder, texts: Texts, number: int) -> None:
        self.encoder, self._texts, self._number = encoder, texts, number

    def tokens(self, haystack: Haystack, window: int, length: int) -> torch.Tensor:
        """(length,) int64, the end of a window."""
        tokens = self._cut(haystack.kind, window, length)
        if haystack.digits == "added":
            numbers = self._cut("numbers", window, length)
            is_digit = self.is_digit(numbers)
            # With the space in front of a number.
            is_space = (numbers == self.encoder.encode(" 4")[0]) & is_digit.roll(-1)
            return torch.where(is_digit | is_space, numbers, tokens)
        if haystack.digits == "letters":
            for digit, token in enumerate(self._digits.tolist()):
                tokens = tokens.masked_fill(tokens == token, self.encoder.encode(chr(ord("a") + digit))[-1])
        return tokens

    def is_digit(self, tokens: torch.Tensor) -> torch.Tensor:
        """Which tokens are a digit."""
        return torch.isin(tokens, self._digits)

    def _cut(self, kind: str, window: int, length: int) -> torch.Tensor:
        starts = self._starts[kind]
        first = starts[(len(starts) - 1) * window // max(self._number - 1, 1)]
        return self._whole[kind.removeprefix(FEW)][first + WINDOW - length : first + WINDOW]

    @cached_property
    def _digits(self) -> torch.Tensor:
        return torch.tensor(self._texts.digit_tokens)

    @cached_property
    def _whole(self) -> dict[str, torch.Tensor]:
        return {documents: torch.tensor(self._texts.whole(documents)) for documents in DOCUMENTS}

    @cached_property
    def _starts(self) -> dict[str, list[int]]:
        """Where the windows of each kind may begin."""
        starts: dict[str, list[int]] = defaultdict(list)
        for documents, tokens in self._whole.items():
            for first in range(0, len(tokens) - WINDOW + 1, STRIDE):
                digits = int(self.is_digit(tokens[first : first + WINDOW]).sum())
                few = documents == "numbers" and 1000 * digits < MANY_DIGITS * WINDOW
                starts[f"{FEW}{documents}" if few else documents].append(first)
        return starts
