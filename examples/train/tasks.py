"""Training sequences: text of the corpus with numbers stated in it, and asked for or stated again later.

Digits of later mentions can be known; those of first statements cannot, and count neither in the text loss nor in the
answer loss. The wording is that of `longmamba eval` (vllm_longmamba/evaluate/needles.py, which this package does not
import: it needs no installation) and of RULER's niah tasks in lm-eval.
"""

import re
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from .corpus import Corpus

TASKS = ("text", "passkey", "needles", "recall", "ruler")
# Kinds of tokens: a digit that can be known has the index of its task.
TEXT, UNKNOWN = 0, 255
PASSKEY = "pass key"
DIGITS, RULER_DIGITS = 5, 7
STATEMENT = {True: "\nThe pass key is {}. Remember it.\n", False: "\nThe magic number of the {name} is {}.\n"}
QUESTION = {
    True: "\nWhat is the pass key? The pass key is {}\n",
    False: "\nWhat is the magic number of the {name}? The magic number of the {name} is {}\n",
}
PASSKEY_IN_RECALL = 0.3
RULER_NEEDLE = " One of the special magic numbers for {name} is: {}."
RULER_NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
RULER_NOISE_SHARE = 1 / 3
# for one answer and for several
RULER_INTRODUCTION = {
    True: "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the number afterwards.\n",
    False: "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you "
    "about the numbers afterwards.\n",
}
RULER_QUESTION = {
    True: "\nWhat is the special magic number for {name} mentioned in the provided text? The special magic number for "
    "{name} mentioned in the provided text is",
    False: "\nWhat are all the special magic numbers for {name} mentioned in the provided text? The special magic "
    "numbers for {name} mentioned in the provided text are",
}
# Names, numbers of each, names asked for, share: niah_single, niah_multikey_1, niah_multivalue, niah_multiquery.
RULER_TASKS = ((1, 1, 1, 0.4), (4, 1, 1, 0.3), (1, 4, 1, 0.15), (4, 1, 4, 0.15))
# Names are words of so many first tokens of the corpus.
NAMES_FROM = 1_000_000

Piece = tuple[list[int], list[int]]  # tokens and their kinds
Drawn = tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]


class TaskWriter:
    """Draws sequences of a corpus with tasks in them."""

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus
        self.digits = [corpus.tokenizer.token_to_id(str(digit)) for digit in range(10)]
        text = corpus.tokenizer.decode(corpus.tokens[:NAMES_FROM].tolist())
        self.names = sorted(set(re.findall(r"\b[a-z]{3,9}\b", text)))
        self.encode = lru_cache(100_000)(lambda text: corpus.tokenizer.encode(text).ids)

    def draw(self, rng: np.random.Generator, task: str, size: int) -> Drawn:
        """A sequence of a task: tokens (size,) and kinds (size,).

        Raises:
            ValueError: the task needs more tokens.
        """
        opening: Piece = ([], [])
        noise: list[int] = []
        hidden: list[Piece] = []
        closing: Piece = ([], [])
        if task == "passkey":
            hidden, closing = self._recall(rng, task, [PASSKEY], 1, size)
        elif task == "needles":
            names = self._names(rng, int(rng.integers(2, 5)))
            hidden, closing = self._recall(rng, task, names, int(rng.integers(1, 3)), size)
        elif task == "recall":
            names = self._names(rng, int(rng.integers(1, 4 + size // 256)))
            if rng.random() < PASSKEY_IN_RECALL:
                names[-1] = PASSKEY
            hidden, closing = self._recall(rng, task, names, int(rng.integers(2, 9 + size // 128)), size)
        elif task == "ruler":
            opening, hidden, closing = self._ruler(rng, size)
            noise = self.encode(RULER_NOISE) if rng.random() < RULER_NOISE_SHARE else []
        return self._assemble(rng, size, opening, hidden, closing, noise)

    def _assemble(
        self,
        rng: np.random.Generator,
        size: int,
        opening: Piece,
        hidden: list[Piece],
        closing: Piece,
        noise: list[int],
    ) -> Drawn:
        """Text, or a repeated sentence, around pieces that keep their order; their places are random."""
        free = size - _length([opening, *hidden, closing])
        if free < 0:
            raise ValueError(f"tasks: sequences of {size} tokens are {-free} too short for a task; make them longer")
        if noise:
            haystack = np.resize(np.array(noise, dtype=np.int32), free)
        else:
            start = int(rng.integers(0, max(1, len(self.corpus.tokens) - free)))
            haystack = np.resize(self.corpus.tokens[start : start + free].astype(np.int32), free)
        unit = max(1, len(noise))
        places = np.sort(rng.integers(0, free + 1, len(hidden))) // unit * unit
        tokens, kinds = [np.array(opening[0], np.int32)], [np.array(opening[1], np.uint8)]
        for part, piece in zip(np.split(haystack, places), [*hidden, closing], strict=True):
            tokens += [part, np.array(piece[0], np.int32)]
            kinds += [np.zeros(len(part), np.uint8), np.array(piece[1], np.uint8)]
        return np.concatenate(tokens), np.concatenate(kinds)

    def _recall(
        self, rng: np.random.Generator, task: str, names: Sequence[str], mentions: int, size: int
    ) -> tuple[list[Piece], Piece]:
        """Statements of names' numbers, later mentions, as far as they fit, and the question at the end.

        In task recall, most mentions are the same statement once more: many digits at all distances.
        """
        kind = TASKS.index(task)
        numbers = [_number(rng, DIGITS) for _ in names]
        stated = [self._sentence(STATEMENT, *item, UNKNOWN) for item in zip(names, numbers, strict=True)]
        last = int(rng.integers(len(names)))
        closing = self._sentence(QUESTION, names[last], numbers[last], kind)
        room = size - _length([*stated, closing])
        for _ in range(mentions - 1):
            which = int(rng.integers(len(names)))
            is_question = task != "recall" or rng.random() < 0.3
            mention = self._sentence(QUESTION if is_question else STATEMENT, names[which], numbers[which], kind)
            room -= len(mention[0])
            if room < 0:
                break
            stated.append(mention)
        return stated, closing

    def _ruler(self, rng: np.random.Generator, size: int) -> tuple[Piece, list[Piece], Piece]:
        """Introduction, needles and question of a niah task; of the simplest one, if the one drawn does not fit."""
        drawn = int(rng.choice(len(RULER_TASKS), p=[share for *_, share in RULER_TASKS]))
        for count, values, asked, _ in (RULER_TASKS[drawn], RULER_TASKS[0]):
            names = [
                f"{first}-{second}" for first, second in zip(*[iter(self._names(rng, 2 * count))] * 2, strict=True)
            ]
            items = [(name, _number(rng, RULER_DIGITS)) for name in names for _ in range(values)]
            rng.shuffle(items)
            queries = names[:asked]
            is_one = asked * values == 1
            query = queries[0] if asked == 1 else f"{', '.join(queries[:-1])}, and {queries[-1]}"
            answers = [str(number) for name in queries for of, number in items if of == name]
            opening = self._plain(RULER_INTRODUCTION[is_one])
            hidden = [self._filled(RULER_NEEDLE, str(name), [str(number)], UNKNOWN) for name, number in items]
            template = RULER_QUESTION[is_one] + " {}" + ", {}" * (len(answers) - 1) + "\n"
            closing = self._filled(template, query, answers, TASKS.index("ruler"))
            if _length([opening, *hidden, closing]) <= size:
                break
        return opening, hidden, closing

    def _names(self, rng: np.random.Generator, count: int) -> list[str]:
        """Distinct names."""
        return [self.names[index] for index in rng.choice(len(self.names), count, replace=False)]

    def _sentence(self, template: dict[bool, str], name: str, number: str, kind: int) -> Piece:
        return self._filled(template[name == PASSKEY], name, [number], kind)

    def _plain(self, text: str) -> Piece:
        ids = self.encode(text)
        return list(ids), [TEXT] * len(ids)

    def _filled(self, template: str, name: str, numbers: Sequence[str], kind: int) -> Piece:
        """A template with a name and, for each {}, a number, whose digits have a kind."""
        first, *rest = template.replace("{name}", name).split("{}")
        tokens, kinds = self._plain(first)
        for number, text in zip(numbers, rest, strict=True):
            after, plain = self._plain(text)
            tokens += [self.digits[int(digit)] for digit in number] + after
            kinds += [kind] * len(number) + plain
        return tokens, kinds


def _length(pieces: Sequence[Piece]) -> int:
    return sum(len(tokens) for tokens, _ in pieces)


def _number(rng: np.random.Generator, digits: int) -> str:
    return str(rng.integers(10 ** (digits - 1), 10**digits))
