"""Needles, pass keys and text of several lengths, for methods of the torch reference."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from vllm_longmamba.evaluate.needles import middles, needle_questions, passkey_questions
from vllm_longmamba.evaluate.perplexity import windows
from vllm_longmamba.evaluate.texts import read_books
from vllm_longmamba.evaluate.torch_contestant import tail_logprobs
from vllm_longmamba.torch_reference import ReadingMethod

from .variants import Subject

Texts = list[list[int]]
DEPTHS = 9
NAMES = 4
SCORED = 100


@dataclass(frozen=True)
class Answers:
    """What a method knows of the numbers asked for.

    Attributes:
        probability: mean probability of the right number.
        found: share of the questions in which every digit of it is the most likely token.
    """

    probability: float
    found: float


class Trial:
    """Questions and windows, the same for all methods of a model whose tokens are bytes.

    Args:
        subject: the model.
        texts: files or folders, to hide numbers in and to score.
        lengths: of the prompts.
        questions: of each kind and length, rounded up to nines.
        windows_each: windows of each length in each text.
    """

    def __init__(
        self, subject: Subject, texts: Sequence[Path], lengths: Sequence[int], questions: int, windows_each: int
    ) -> None:
        self._subject = subject
        encoder = subject.encoder
        books = {book.name: encoder.encode(book.text) for book in read_books(list(texts))}
        haystack = [token for book in books.values() for token in book]
        depths, seeds = middles(DEPTHS), range(-(-questions // DEPTHS))
        # (task, length) -> prompts and the digits that answer them; length -> texts to be scored.
        self._asked: dict[tuple[str, int], tuple[Texts, Texts]] = {}
        self._texts: dict[int, Texts] = {}
        for length in lengths:
            kinds = {
                "needles": needle_questions([length], depths, seeds, NAMES),
                "passkey": passkey_questions([length], depths, seeds),
            }
            for task, asked in kinds.items():
                pairs = [(encoder.prompt(one, haystack), encoder.encode(one.asked[0].number)) for one in asked]
                self._asked[task, length] = [prompt for prompt, _ in pairs], [digits for _, digits in pairs]
            sizes = {name: len(tokens) for name, tokens in books.items() if len(tokens) >= length}
            chosen = windows(sizes, [length], windows_each, SCORED)
            self._texts[length] = [window.tokens(books[window.book], []) for window in chosen]

    def answers(self, method: ReadingMethod, task: str, length: int) -> Answers:
        """What the method knows of the numbers of a task, "needles" or "passkey", in prompts of a length."""
        model = self._subject.model.with_method(method)
        logprobs, right = [], []
        for prompts, numbers in self._portions(length, *self._asked[task, length]):
            digits = torch.tensor(numbers, device=model.device)
            reading = model.read(prompts)
            logits = torch.cat([reading.logits, reading.append(digits[:, :-1])], dim=1)
            logprobs += [one.sum() for one in tail_logprobs(logits, numbers)]
            right += (logits.argmax(-1) == digits).all(1).tolist()
        return Answers(float(np.exp(logprobs).mean()), float(np.mean(right)))

    def loss(self, method: ReadingMethod, length: int) -> float:
        """Mean loss of the last tokens of the windows of a length, in nats."""
        model = self._subject.model.with_method(method)
        logprobs = []
        for (texts,) in self._portions(length, self._texts[length]):
            logprobs += tail_logprobs(model.read(texts, SCORED + 1).logits[:, :-1], texts)
        return -float(np.mean(logprobs))

    def _portions(self, length: int, *lists: Texts) -> Iterator[tuple[Texts, ...]]:
        """The lists side by side, in portions that the model reads at once."""
        together = max(1, self._subject.model.segment_tokens // length)
        for start in range(0, len(lists[0]), together):
            yield tuple(one[start : start + together] for one in lists)
