"""The passkey and the needles task: five-digit numbers, hidden in a long text, are asked for at the end of it.

Texts are hidden in and cut as sequences of anything: tokens here, characters in examples/passkey.py.
"""

import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

KEY_DIGITS = 5
PASSKEY_NEEDLE = "\nThe pass key is {number}. Remember it.\n"
PASSKEY_QUESTION = "\nWhat is the pass key? The pass key is "
NEEDLE = "\nThe magic number of the {name} is {number}.\n"
ONE_QUESTION = "\nWhat is the magic number of the {names}? The magic number of the {names} is "
ALL_QUESTION = "\nWhat are the magic numbers of the {names}? The magic numbers of the {names} are "
NAMES = (
    "river", "castle", "forest", "garden", "harbour", "mountain", "bridge", "island", "meadow", "lantern", "anchor",
    "orchard", "tower", "valley", "mirror", "wagon", "candle", "desert", "compass", "temple", "saddle", "window",
    "hammer", "violin",
)  # fmt: skip
# Tokens to leave for an answer: the digits and a space; of several, also what stands between them.
_ANSWER_TOKENS = KEY_DIGITS + 2
_ANSWER_TOKENS_OF_SEVERAL = 16

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
        return NEEDLE.format(name=self.name, number=self.number) if self.name else passkey_needle(self.number)


@dataclass(frozen=True)
class Question:
    """One prompt of a task.

    Attributes:
        task: "passkey" or "needles".
        length: tokens of the prompt.
        depth: depth of the needle asked for; None where all are asked for.
        seed: seed of everything random about it.
        needles: the numbers in the text.
        asked: those asked for.
        start: where in the haystack the text begins, as a share of the places where it can begin.
    """

    task: str
    length: int
    depth: float | None
    seed: int
    needles: tuple[Needle, ...]
    asked: tuple[Needle, ...]
    start: float

    def text(self) -> str:
        """The question at the end of the prompt."""
        if not self.asked[0].name:
            return PASSKEY_QUESTION
        names = [needle.name for needle in self.asked]
        if len(names) == 1:
            return ONE_QUESTION.format(names=names[0])
        return ALL_QUESTION.format(names=", the ".join(names[:-1]) + " and the " + names[-1])

    def max_answer_tokens(self) -> int:
        """Tokens to generate, for any tokenizer that takes a digit for at most a token."""
        return _ANSWER_TOKENS if len(self.asked) == 1 else _ANSWER_TOKENS_OF_SEVERAL * len(self.asked)

    def found_in(self, answer: str) -> list[bool]:
        """Which of the numbers asked for an answer gives: a single one at its beginning, several anywhere in it."""
        if len(self.asked) == 1:
            return [answer.lstrip().startswith(self.asked[0].number)]
        given = re.findall(r"\d+", answer)
        return [needle.number in given for needle in self.asked]


def passkey_needle(number: str) -> str:
    """The sentence that holds a pass key."""
    return PASSKEY_NEEDLE.format(number=number)


def middles(parts: int) -> list[float]:
    """Depths in the middle of `parts` equal parts of the text."""
    return [(part + 0.5) / parts for part in range(parts)]


def passkey_questions(lengths: Iterable[int], depths: Sequence[float], seeds: Sequence[int]) -> Iterator[Question]:
    """One question for every length, depth and seed. Each depends on these three only, not on the rest of the grid."""
    for length, depth, seed in _grid(lengths, depths, seeds):
        rng = random.Random(f"passkey {length} {depth:.6f} {seed}")
        key = Needle("", _number(rng), depth)
        yield Question("passkey", length, depth, seed, (key,), (key,), rng.random())


def needle_questions(
    lengths: Iterable[int], depths: Sequence[float], seeds: Sequence[int], needles: int, ask_all: bool = False
) -> Iterator[Question]:
    """Questions of the needles task, several numbers of different names in one text.

    Args:
        lengths: tokens of the prompts.
        depths: where the needle asked for stands; the others stand anywhere. With `ask_all` the needles stand at
            equal distances, and `depths` is not used.
        seeds: one question for each, of every length and depth.
        needles: numbers in each text, at most the number of `NAMES`.
        ask_all: ask for all numbers in one question instead of for one.

    Raises:
        ValueError: too many needles, or fewer than one.
    """
    if not 1 <= needles <= len(NAMES):
        raise ValueError(f"needles: their number must lie between 1 and {len(NAMES)}, got {needles}")
    for length, depth, seed in _grid(lengths, [0.0] if ask_all else depths, seeds):
        rng = random.Random(f"needles {length} {'all' if ask_all else f'{depth:.6f}'} {needles} {seed}")
        names = rng.sample(NAMES, needles)
        numbers = rng.sample(range(10 ** (KEY_DIGITS - 1), 10**KEY_DIGITS), needles)
        places = middles(needles) if ask_all else [depth, *(rng.random() for _ in names[1:])]
        hidden = [Needle(*parts) for parts in zip(names, map(str, numbers), places, strict=True)]
        asked = rng.sample(hidden, needles) if ask_all else hidden[:1]
        yield Question("needles", length, None if ask_all else depth, seed, tuple(hidden), tuple(asked), rng.random())


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


def _grid(lengths: Iterable[int], depths: Sequence[float], seeds: Sequence[int]) -> Iterator[tuple[int, float, int]]:
    return ((length, depth, seed) for length in lengths for depth in depths for seed in seeds)
