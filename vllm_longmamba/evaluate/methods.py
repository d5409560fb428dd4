"""The methods that are compared. A new one is an entry of `METHODS` and a `Contestant` to go with it."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

from vllm_longmamba.evaluate.statistics import Floats
from vllm_longmamba.evaluate.texts import Encoder

Key = TypeVar("Key")


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
        train_length: tokens of the sequences the model was trained on, None where nobody says.
    """

    @property
    def description(self) -> Mapping[str, Any]: ...

    @property
    def encoder(self) -> Encoder: ...

    @property
    def train_length(self) -> int | None: ...

    def start(self) -> AbstractContextManager[Runner]:
        """Load the model; it is freed at the end."""


@dataclass(frozen=True)
class ModelSettings:
    """A model as the user named it.

    Attributes:
        model: name or folder, as for `vllm serve`.
        options: options of LongMamba, as in `additional_config`.
        engine_args: further arguments of vLLM's `LLM`.
        decimamba: settings of DeciMamba; None where nobody gave any.
    """

    model: str
    options: Mapping[str, Any]
    engine_args: Mapping[str, Any]
    decimamba: Mapping[str, Any] | None = None


def _plain(settings: ModelSettings) -> Contestant:
    from vllm_longmamba.evaluate.engine import EngineContestant

    return EngineContestant(settings.model, {"filter": False}, settings.engine_args)


def _longmamba(settings: ModelSettings) -> Contestant:
    from vllm_longmamba.evaluate.engine import EngineContestant

    return EngineContestant(settings.model, settings.options, settings.engine_args)


def _torch(method: Literal["plain", "longmamba", "decimamba"]) -> Callable[[ModelSettings], Contestant]:
    def prepare(settings: ModelSettings) -> Contestant:
        from vllm_longmamba.evaluate.torch_contestant import TorchContestant

        return TorchContestant(settings, method)

    return prepare


METHODS: dict[str, Callable[[ModelSettings], Contestant]] = {
    "plain": _plain,
    "longmamba": _longmamba,
    "decimamba": _torch("decimamba"),
    "torch-plain": _torch("plain"),
    "torch-longmamba": _torch("longmamba"),
}


class _Labels(dict[str, str]):
    """A name that is none of `METHODS`, as joined reports have them, is its own label."""

    def __missing__(self, name: str) -> str:
        return name


LABELS = _Labels(
    {
        "plain": "plain",
        "longmamba": "LongMamba",
        "decimamba": "DeciMamba",
        "torch-plain": "plain (torch)",
        "torch-longmamba": "LongMamba (torch)",
    }
)


def parse_methods(names: str) -> list[str]:
    """Read "plain,longmamba".

    Raises:
        ValueError: an unknown name, or one that comes twice.
    """
    methods = [name.strip() for name in names.split(",")]
    if unknown := [name for name in methods if name not in METHODS]:
        raise ValueError(f"--method: unknown are {', '.join(unknown) or 'empty names'}; known are {', '.join(METHODS)}")
    if len(set(methods)) < len(methods):
        raise ValueError(f"--method: every method may be named once, got {names}")
    return methods
