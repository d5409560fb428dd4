"""The methods that are compared. A new one is an entry of `METHODS` and a `Contestant` to go with it."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from vllm_longmamba.evaluate.engine import EngineContestant
from vllm_longmamba.evaluate.reference_models import reference_module
from vllm_longmamba.evaluate.runner import Contestant, Starting


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
    return EngineContestant(settings.plain, filters=False, starting=settings.starting)


def _longmamba(settings: ModelSettings) -> Contestant:
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
