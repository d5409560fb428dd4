"""The methods that are compared. A new one is an entry of `METHODS` and a `Contestant` to go with it."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from vllm_longmamba.evaluate.reference_models import reference_module
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


@dataclass(frozen=True)
class ModelSettings:
    """A model as the user named it.

    Attributes:
        plain, longmamba: arguments of vLLM's `LLM` for either method.
        starting: wraps the start of each engine.
        decimamba: settings of DeciMamba; None where nobody gave any.
    """

    plain: Mapping[str, Any]
    longmamba: Mapping[str, Any]
    starting: Starting = nullcontext
    decimamba: Mapping[str, Any] | None = None

    @property
    def model(self) -> str:
        """Name or folder, as for `vllm serve`."""
        return str(self.plain["model"])

    def with_room(self, tokens: int) -> "ModelSettings":
        """For prompts and answers of so many tokens, unless the user said how many."""
        room = {"max_model_len": tokens}
        return replace(self, plain=room | dict(self.plain), longmamba=room | dict(self.longmamba))


def _plain(settings: ModelSettings) -> Contestant:
    from vllm_longmamba.evaluate.engine import EngineContestant

    return EngineContestant(settings.plain, filters=False, starting=settings.starting)


def _longmamba(settings: ModelSettings) -> Contestant:
    from vllm_longmamba.evaluate.engine import EngineContestant

    return EngineContestant(settings.longmamba, starting=settings.starting)


def _torch(method: str) -> Callable[[ModelSettings], Contestant]:
    def prepare(settings: ModelSettings) -> Contestant:
        contestant: Contestant = reference_module("torch_models.contestant").TorchContestant(settings, method)
        return contestant

    return prepare


METHODS: dict[str, Callable[[ModelSettings], Contestant]] = {
    "plain": _plain,
    "longmamba": _longmamba,
    "decimamba": _torch("decimamba"),
    "torch-plain": _torch("plain"),
    "torch-longmamba": _torch("longmamba"),
}
LABELS = {
    "plain": "plain",
    "longmamba": "LongMamba",
    "decimamba": "DeciMamba",
    "torch-plain": "plain (torch)",
    "torch-longmamba": "LongMamba (torch)",
}


def parse_methods(names: str, known: Iterable[str] = METHODS) -> list[str]:
    """Read "plain,longmamba".

    Raises:
        ValueError: an unknown name, or one that comes twice.
    """
    methods = [name.strip() for name in names.split(",")]
    if unknown := [name for name in methods if name not in known]:
        raise ValueError(f"--method: unknown are {', '.join(unknown) or 'empty names'}; known are {', '.join(known)}")
    if len(set(methods)) < len(methods):
        raise ValueError(f"--method: every method may be named once, got {names}")
    return methods
