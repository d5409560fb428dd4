"""Models and engines that the engine tests share."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tiny_models

from .harness import Engine, write_table

WRITERS = {
    "mamba1": tiny_models.write_mamba1_original,
    "mamba2": tiny_models.write_mamba2_original,
    "falcon_mamba": tiny_models.write_falcon_mamba,
    "zamba2": tiny_models.write_zamba2,
    "jamba": tiny_models.write_jamba,
    "granite_hybrid": tiny_models.write_granite_hybrid,
    "falcon_h1": tiny_models.write_falcon_h1,
    "nemotron_h": tiny_models.write_nemotron_h,
}


# Stands for the other hybrids where a test is not run with each of them; in the slow tests.
A_HYBRID = pytest.param("granite_hybrid", marks=pytest.mark.slow)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Function: family -> folder with a tiny random checkpoint and, outside it, its table `<folder>.table`."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = WRITERS[family](tmp_path_factory.mktemp("models") / family)
        return made[family]

    return make


@pytest.fixture(scope="session")
def tiny_table(tiny_model: Callable[[str], Path]) -> Callable[[str], tuple[Path, Any]]:
    """Function: family -> (path of its threshold table, the table)."""
    made: dict[str, tuple[Path, Any]] = {}

    def make(family: str) -> tuple[Path, Any]:
        if family not in made:
            path = tiny_model(family).with_suffix(".table.safetensors")
            made[family] = path, write_table(tiny_model(family), path)
        return made[family]

    return make


@pytest.fixture(scope="session")
def engine(tiny_model: Callable[[str], Path]) -> Iterator[Callable[..., Engine]]:
    """Function: (family or folder, engine arguments) -> engine; the last one is reused while nothing changes."""
    running: list[tuple[Any, Engine]] = []

    def start(model: str | Path, **engine_args: Any) -> Engine:
        key = (str(model), repr(sorted(engine_args.items())))
        if running and running[0][0] == key:
            return running[0][1]
        while running:
            running.pop()[1].close()
        folder = tiny_model(model) if isinstance(model, str) else model
        running.append((key, Engine(folder, **engine_args)))
        return running[0][1]

    yield start
    while running:
        running.pop()[1].close()


def longmamba(table: Path | None = None, **options: Any) -> dict[str, Any]:
    """Engine arguments for LongMamba with a table, or without the filter."""
    own = {"table": str(table), **options} if table is not None else {"filter": False, **options}
    return {"model_impl": "longmamba", "additional_config": {"longmamba": own}}
