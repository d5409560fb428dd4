"""The passkey and the needles task: five-digit numbers, hidden in a long text, are asked for at the end of it.

Texts are hidden in and cut as sequences of anything: tokens here, characters in examples/passkey.py.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, TypeVar

KEY_DIGITS = 5
PASSKEY_NEEDLE = "\nThe pass key is {number}. Remember it.\n"
PASSKEY_QUESTION = "\nWhat is the pass key? The pass key is "
NEEDLE = "\nThe magic number of the {name} is {number}.\n"
ONE_QUESTION = "\nWhat is the magic number of the {names}? The magic number of the {names} is "
NAMES = (
    "river", "castle", "forest", "garden", "harbour", "mountain", "bridge", "island", "meadow", "lantern", "anchor",
    "orchard", "tower", "valley", "mirror", "wagon", "candle", "desert", "compass", "temple", "saddle", "window",
    "hammer", "violin",
)  # fmt: skip
# Tokens to generate, for any tokenizer that takes a digit for at most a token: the digits and a space.
ANSWER_TOKENS = KEY_DIGITS + 2

Text = TypeVar("Text", str, list[int])


@dataclass(frozen=True)
class Needle:
    """A number in the text.

    Attributes:
        name: whose number it is; "" for the pass key.
        number: the digits.
        depth: share of the text that stands before it, 0 to 1.
    """

    name: str
    number: str
    depth: float

    def text(self) -> str:
        """The sentence that holds the number."""
        return (NEEDLE if self.name else PASSKEY_NEEDLE).format(name=self.name, number=self.number)


@dataclass(frozen=True)
class Question:
    """One prompt of a task.

    Attributes:
        task: "passkey" or "needles".
        length: tokens of the prompt.
        depth: of the needle asked for.
        seed: seed of everything random about it.
        needles: the numbers in the text, that asked for first.
        start: where in the haystack the text begins, as a share of the places where it can begin.
    """

    task: str
    length: int
    depth: float
    seed: int
    needles: tuple[Needle, ...]
    start: float

    @property
    def identity(self) -> dict[str, Any]:
        """What tells it from the other questions of a run."""
        return {"task": self.task, "length": self.length, "depth": self.depth, "seed": self.seed}

    @property
    def asked(self) -> Needle:
        """The needle asked for."""
        return self.needles[0]

    def text(self) -> str:
        """The question at the end of the prompt."""
        return ONE_QUESTION.format(names=self.asked.name) if self.asked.name else PASSKEY_QUESTION

    def found_in(self, answer: str) -> bool:
        """Whether an answer begins with the number asked for."""
        return answer.lstrip().startswith(self.asked.number)


def middles(parts: int) -> list[float]:
    """Depths in the middle of `parts` equal parts of the text."""
    return [(part + 0.5) / parts for part in range(parts)]


def passkey_questions(lengths: Iterable[int], depths: Sequence[float], seeds: Sequence[int]) -> Iterator[Question]:
    """One question for every length, depth and seed. Each depends on these three only, not on the rest of the grid."""
    for length, depth, seed in product(lengths, depths, seeds):
        rng = random.Random(f"passkey {length} {depth:.6f} {seed}")
        key = Needle("", _number(rng), depth)
        yield Question("passkey", length, depth, seed, (key,), rng.random())


def needle_questions(
    lengths: Iterable[int], depths: Sequence[float], seeds: Sequence[int], needles: int
) -> Iterator[Question]:
    """Questions of the needles task, several numbers of different names in one text, of which one is asked for.

    Args:
        lengths: tokens of the prompts.
        depths: where the needle asked for stands; the others stand anywhere.
        seeds: one question for each, of every length and depth.
        needles: numbers in each text, at most the number of `NAMES`.

    Raises:
        ValueError: too many needles, or fewer than one.
    """
    if not 1 <= needles <= len(NAMES):
        raise ValueError(f"needles: their number must lie between 1 and {len(NAMES)}, got {needles}")
    for length, depth, seed in product(lengths, depths, seeds):
        rng = random.Random(f"needles {length} {depth:.6f} {needles} {seed}")
        names = rng.sample(NAMES, needles)
        numbers = rng.sample(range(10 ** (KEY_DIGITS - 1), 10**KEY_DIGITS), needles)
        places = [depth, *(rng.random() for _ in names[1:])]
        hidden = [Needle(*parts) for parts in zip(names, map(str, numbers), places, strict=True)]
        yield Question("needles", length, depth, seed, tuple(hidden), rng.random())


def hide(text: Text, needles: Iterable[tuple[float, Text]]) -> Text:
    """Put needles into a text.

    Args:
        text: characters or tokens.
        needles: for each, the share of the text that stands before it, 0 to 1, and the needle.

    Returns:
        Text and needles, nothing left out.
    """
    result, done = text[:0], 0
    for depth, needle in sorted(needles, key=lambda pair: pair[0]):
        place = round(depth * len(text))
        result = result + text[done:place] + needle
        done = place
    return result + text[done:]


def _number(rng: random.Random) -> str:
    return str(rng.randrange(10 ** (KEY_DIGITS - 1), 10**KEY_DIGITS))
