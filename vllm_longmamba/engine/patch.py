"""One patch of vLLM: what it wraps, why, and the check that this is still what it was written for."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm_longmamba.compatibility import IncompatibleVllmError

# On a wrapper: it is one of ours.
MARK = "__longmamba_patch__"


@dataclass(frozen=True)
class Patch:
    """One wrapped function of vLLM.

    Attributes:
        module: where the function lives.
        owner: the class it is a method of, None for a function of the module.
        name: its name.
        parameters: the parameters the wrapper relies on, in order; further ones may follow.
        wrap: makes the replacement from the original.
        reason: why no public hook will do.
        in_worker: the module is heavy and only a worker needs the patch, which is applied when it builds a model.
    """

    module: str
    owner: str | None
    name: str
    parameters: tuple[str, ...]
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
    reason: str
    in_worker: bool = False

    def holder(self) -> Any:
        """The class or module whose attribute is replaced.

        Raises:
            IncompatibleVllmError: it does not exist in this vLLM.
        """
        try:
            module = __import__(self.module, fromlist=["_"])
            return getattr(module, self.owner) if self.owner else module
        except (ImportError, AttributeError) as error:
            raise self._drift(f"it cannot be imported: {error}") from error

    def check(self) -> None:
        """Check that the function to be wrapped has the signature the wrapper was written for.

        Raises:
            IncompatibleVllmError: it does not.
        """
        function = getattr(self.holder(), self.name, None)
        if function is None:
            raise self._drift("it does not exist")
        found = tuple(inspect.signature(function).parameters)
        if found[: len(self.parameters)] != self.parameters:
            raise self._drift(f"its parameters are {', '.join(found)}, not {', '.join(self.parameters)}")

    def apply(self) -> None:
        """Replace the function by its wrapper, unless that was done before."""
        holder = self.holder()
        original = getattr(holder, self.name, None)
        if hasattr(original, MARK):
            return
        self.check()
        assert original is not None
        replacement = self.wrap(original)
        replacement.__wrapped__ = original  # type: ignore[attr-defined]
        setattr(replacement, MARK, True)
        setattr(holder, self.name, replacement)

    def _drift(self, what: str) -> IncompatibleVllmError:
        target = ".".join(part for part in (self.module, self.owner, self.name) if part)
        return IncompatibleVllmError(
            f"vllm_longmamba cannot extend {target} of this vLLM: {what}. "
            "Install a vLLM version that this release of vllm_longmamba was tested with."
        )
