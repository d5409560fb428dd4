"""The methods that are compared. A new one is an entry of `METHODS`."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

from vllm_longmamba import decimamba_options
from vllm_longmamba.architectures import DECIMAMBA
from vllm_longmamba.evaluate.engine import DeciMambaContestant, EngineContestant, Starting


@dataclass(frozen=True)
class ModelSettings:
    """A model as the user named it.

    Attributes:
        plain, longmamba: arguments of vLLM's `LLM` for either method.
        starting: wraps the start of each engine.
        decimamba: options of DeciMamba, whose engine has the arguments of the plain one otherwise.
    """

    plain: Mapping[str, Any]
    longmamba: Mapping[str, Any]
    starting: Starting = nullcontext
    decimamba: Mapping[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> str:
        """Name or folder, as for `vllm serve`."""
        return str(self.plain["model"])

    def with_room(self, tokens: int) -> "ModelSettings":
        """For prompts and answers of so many tokens, unless the user said how many."""
        room = {"max_model_len": tokens}
        return replace(self, plain=room | dict(self.plain), longmamba=room | dict(self.longmamba))


def _plain(settings: ModelSettings) -> EngineContestant:
    return EngineContestant(settings.plain, filters=False, starting=settings.starting)


def _longmamba(settings: ModelSettings) -> EngineContestant:
    return EngineContestant(settings.longmamba, starting=settings.starting)


def _decimamba(settings: ModelSettings) -> EngineContestant:
    own = {decimamba_options.KEY: settings.decimamba} if settings.decimamba else {}
    changes = {"model_impl": DECIMAMBA, "additional_config": settings.plain.get("additional_config", {}) | own}
    return DeciMambaContestant({**settings.plain, **changes}, starting=settings.starting)


METHODS: dict[str, Callable[[ModelSettings], EngineContestant]] = {
    "plain": _plain,
    "longmamba": _longmamba,
    "decimamba": _decimamba,
}
LABELS = {"plain": "plain", "longmamba": "LongMamba", "decimamba": "DeciMamba"}


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
