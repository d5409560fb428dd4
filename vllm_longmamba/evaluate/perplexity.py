"""Perplexity on long text by the protocol of LongMamba and DeciMamba: the last tokens of windows of growing length.

Both papers (arXiv 2504.16053 and 2406.14528) take at most 10 windows of each book of PG-19 and the loss of a window's
last 100 tokens only, so that every length is judged on tokens that have that much in front of them. Here the windows of
all lengths end at the same places of a book, so that every length is judged on the same tokens.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

SCORED_TOKENS = 100
WINDOWS = 10


@dataclass(frozen=True)
class Window:
    """A piece of a book.

    Attributes:
        book: the book's name.
        length: tokens of the prompt, the tokenizer's own prefix included.
        end: where it ends, in tokens of the prefix and the book.
    """

    book: str
    length: int
    end: int

    @property
    def identity(self) -> dict[str, Any]:
        """What tells it from the other windows of a run."""
        return {"task": "perplexity", **asdict(self)}

    def tokens(self, book: list[int], prefix: list[int]) -> list[int]:
        """The prompt: exactly `length` tokens."""
        return prefix + book[self.end - self.length : self.end - len(prefix)]


def windows(
    book_tokens: Mapping[str, int], lengths: Sequence[int], windows: int = WINDOWS, scored: int = SCORED_TOKENS
) -> Iterator[Window]:
    """The windows of all books, the short ones first.

    Args:
        book_tokens: tokens of each book, the tokenizer's prefix included. A book that is shorter than some lengths has
            windows of the others.
        lengths: tokens of the windows.
        windows: at most so many windows of each length in each book, at a constant stride.
        scored: tokens to be scored at a window's end. The tokens scored in two windows of one length never overlap.

    Raises:
        ValueError: a length of no more than `scored` tokens, or one that no book has.
    """
    if min(lengths) <= scored:
        raise ValueError(f"perplexity: lengths must exceed the {scored} tokens that are scored, got {min(lengths)}")
    if max(lengths) > max(book_tokens.values()):
        raise ValueError(
            f"perplexity: no text has {max(lengths)} tokens, the longest has {max(book_tokens.values())}; give longer "
            "texts or shorter --lengths"
        )
    ends: dict[str, list[int]] = {}
    for book, tokens in book_tokens.items():
        longest = max((length for length in lengths if length <= tokens), default=None)
        if longest is not None:
            number = min(windows, 1 + (tokens - longest) // scored)
            ends[book] = np.linspace(longest, tokens, number).astype(int).tolist()
    for length in sorted(lengths):
        for book, tokens in book_tokens.items():
            if length <= tokens:
                yield from (Window(book, length, end) for end in ends[book])
