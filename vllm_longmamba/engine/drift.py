"""Whether the installed vLLM still has what the plugin leans on.

Every import of the plugin is checked, read from its sources, and the lists of vllm_names.py and vllm_sources.py. The
tests run all checks on every vLLM; an engine runs them on a vLLM that is newer than those the plugin was tested with.
"""

import ast
import dataclasses
import importlib
import inspect
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from vllm_longmamba.compatibility import TESTED_VLLM, IncompatibleVllmError, installed_vllm_version, is_newer
from vllm_longmamba.engine.vllm_names import FIELDS, KEYWORDS, SIGNATURES, SYMBOLS
from vllm_longmamba.engine.vllm_sources import SOURCES

logger = logging.getLogger("vllm.longmamba")

_PACKAGE = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Check:
    """One thing of vLLM.

    Attributes:
        target: what is looked at, "module:name".
        run: raises IncompatibleVllmError if it has changed.
    """

    target: str
    run: Callable[[], None]


@lru_cache(maxsize=1)
def check_newer_vllm(patches: tuple[Any, ...]) -> None:
    """Run all checks on a vLLM that is newer than the tested ones, and warn of it; once per process.

    Args:
        patches: those of patches.py.

    Raises:
        IncompatibleVllmError: one fails. The message names what has changed.
    """
    version = installed_vllm_version()
    if not is_newer(version):
        return
    for check in all_checks(patches):
        try:
            check.run()
        except IncompatibleVllmError as error:
            raise IncompatibleVllmError(
                f"vllm_longmamba was tested with vLLM {' and '.join(TESTED_VLLM)}; vLLM {version} is installed, in "
                f"which {error}. Install vLLM {TESTED_VLLM[-1]}, or a newer vllm_longmamba; or leave --model-impl out."
            ) from error
    logger.warning(
        "LongMamba was tested with vLLM %s, but vLLM %s is installed. It has everything that LongMamba relies on by "
        "name; whether results are still exact was not tested.",
        " and ".join(TESTED_VLLM),
        version,
    )


def all_checks(patches: tuple[Any, ...]) -> Iterator[Check]:
    """Every check, of the patches first."""
    for patch in patches:
        target = f"{patch.module}:{patch.owner + '.' if patch.owner else ''}{patch.name}"
        yield Check(target, patch.check)
    for target, file in imported_names():
        yield _check(_exists, target, f"imported by {file}")
    for target, used_by in SYMBOLS:
        yield _check(_exists, target, used_by)
    for target, parameters, used_by in SIGNATURES:
        yield _check(_begins_with, target, used_by, parameters.split())
    for target, parameters, used_by in KEYWORDS:
        yield _check(_takes, target, used_by, parameters.split())
    for target, fields, used_by in FIELDS:
        yield _check(_has_fields, target, used_by, fields.split())
    for target, pattern, meaning, used_by in SOURCES:
        yield _check(_still_does, target, used_by, pattern, meaning)


def imported_names() -> list[tuple[str, str]]:
    """Every name that the plugin imports from vLLM, "module:name", and the file that does."""
    return sorted(
        {
            (f"{node.module}:{alias.name}", path.name)
            for path in _PACKAGE.rglob("*.py")
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "vllm"
            for alias in node.names
        }
    )


def _check(look: Callable[..., str | None], target: str, used_by: str, *expected: Any) -> Check:
    def run() -> None:
        try:
            problem = look(_resolve(target), *expected)
        except (ImportError, AttributeError) as error:
            problem = f"is gone ({error})"
        if problem is not None:
            raise IncompatibleVllmError(f"{target} {problem} (used by {used_by})")

    return Check(target, run)


def _resolve(target: str) -> Any:
    module, _, name = target.partition(":")
    found: Any = importlib.import_module(module)
    for part in filter(None, name.split(".")):
        if inspect.ismodule(found) and not hasattr(found, part):
            importlib.import_module(f"{found.__name__}.{part}")
        found = getattr(found, part)
    # Our own wrapper, once the plugin is registered, has vLLM's function behind it.
    return inspect.unwrap(found) if callable(found) else found


def _exists(found: Any) -> str | None:
    return "is None" if found is None else None


def _begins_with(function: Any, parameters: list[str]) -> str | None:
    has = list(inspect.signature(function).parameters)
    return None if has[: len(parameters)] == parameters else f"takes {', '.join(has)}, not {', '.join(parameters)}"


def _takes(function: Any, parameters: list[str]) -> str | None:
    signature = inspect.signature(function)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values()):
        return None
    missing = [name for name in parameters if name not in signature.parameters]
    return f"takes no {', '.join(missing)}" if missing else None


def _has_fields(cls: Any, fields: list[str]) -> str | None:
    is_dataclass = dataclasses.is_dataclass(cls)
    has = {field.name for field in dataclasses.fields(cls)} if is_dataclass else set(cls.__struct_fields__)
    missing = [name for name in fields if name not in has]
    return f"has no field {', '.join(missing)}" if missing else None


def _still_does(found: Any, pattern: str, meaning: str) -> str | None:
    return None if re.search(pattern, inspect.getsource(found)) else f"has changed; counted on was: {meaning}"
