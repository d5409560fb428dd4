"""A contestant without a model: it finds keys in the first half of a text, and every token costs one nat."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from vllm_longmamba.evaluate.texts import Encoder


class ByteTokenizer:
    """One token a byte."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode(errors="replace")


class HalfBlind:
    """Counts how often it was started, and what was asked; `fail_after` makes it stop there."""

    def __init__(self, name: str, fail_after: int | None = None) -> None:
        self.description: dict[str, Any] = {"name": name}
        self.encoder = Encoder(ByteTokenizer())
        self.starts = 0
        self.jobs = 0
        self._fail_after = fail_after

    @contextmanager
    def start(self) -> Iterator["HalfBlind"]:
        self.starts += 1
        yield self

    def complete(self, jobs: Iterable[tuple[Any, list[int], int]]) -> Iterator[tuple[Any, str]]:
        for key, tokens, _ in jobs:
            self._count()
            before, _, after = bytes(tokens).partition(b"The pass key is ")
            yield key, after[:5].decode() if len(before) < len(tokens) / 2 else "dunno"

    def tail_logprobs(self, jobs: Iterable[tuple[Any, list[int]]], scored: int) -> Iterator[tuple[Any, Any]]:
        for key, tokens in jobs:
            self._count()
            assert len(tokens) > scored
            yield key, np.full(scored, -1.0)

    def _count(self) -> None:
        if self._fail_after is not None and self.jobs == self._fail_after:
            raise KeyboardInterrupt
        self.jobs += 1
