"""What a model is to an evaluation, whatever runs it."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

from vllm_longmamba.evaluate.statistics import Floats
from vllm_longmamba.evaluate.texts import Encoder

Key = TypeVar("Key")
# Wraps the start of an engine.
Starting = Callable[[], AbstractContextManager[None]]


class Runner(Protocol):
    """A model at work. Jobs are taken from the iterable as they are needed; results come in any order."""

    def complete(self, jobs: Iterable[tuple[Key, list[int], int]]) -> Iterator[tuple[Key, str]]:
        """Continue prompts greedily.

        Args:
            jobs: for each prompt a key, its tokens, and how many to generate at most.

        Returns:
            The key and the text generated.
        """

    def tail_logprobs(self, jobs: Iterable[tuple[Key, list[int]]], scored: int) -> Iterator[tuple[Key, Floats]]:
        """Score the last tokens of prompts, which count as prompt tokens themselves.

        Args:
            jobs: for each prompt a key and its tokens, more than `scored`.
            scored: tokens to score.

        Returns:
            The key and (scored,) log-probabilities of the last tokens, each given all tokens before it.
        """


class Contestant(Protocol):
    """A model and a method, not yet started.

    Attributes:
        description: everything that determines its output, as plain values.
        encoder: its tokenizer.
    """

    @property
    def description(self) -> Mapping[str, Any]: ...

    @property
    def encoder(self) -> Encoder: ...

    def start(self) -> AbstractContextManager[Runner]:
        """Load the model; it is freed at the end."""
