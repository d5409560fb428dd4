"""Tests of vllm_longmamba/calibration/at_start.py without an engine: what is stored, what is reused, what may fail."""

import errno
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from calibration_settings import PAPER_SETTINGS
from small_tables import small_table

import vllm_longmamba.calibration.at_start as calibrate_at_start
from vllm_longmamba.calibration.at_start import provide_table
from vllm_longmamba.calibration.settings import CalibrationSettings, to_config
from vllm_longmamba.calibration.worker import use_table
from vllm_longmamba.tables import ThresholdTable, load_table, save_table, table_from_bytes, table_to_bytes


@pytest.fixture
def settings(tmp_path: Path) -> CalibrationSettings:
    store = tmp_path / "cache" / "vllm_longmamba" / "table.safetensors"
    return replace(PAPER_SETTINGS, train_length=8, max_length=20, store=str(store))


class Executor:
    """Stands for vLLM's executor: remembers the table that the workers are given."""

    given: ThresholdTable | None = None

    def collective_rpc(self, method: Callable[..., Any], args: tuple[Any, ...]) -> None:
        assert method is use_table
        self.given = table_from_bytes(args[0])


@pytest.fixture
def start(settings: CalibrationSettings, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Any, int]]:
    """Function: starts an engine; what the workers got, and how often it calibrated."""

    def run(*to_make: CalibrationSettings, max_model_len: int = 100) -> tuple[Any, int]:
        calibrated = []

        def calibrate(settings: CalibrationSettings, *args: Any) -> ThresholdTable:
            calibrated.append(settings)
            return small_table(seed=settings.seed)

        monkeypatch.setattr(calibrate_at_start, "_calibrate", calibrate)
        executor = Executor()
        config = SimpleNamespace(
            additional_config=to_config(list(to_make) or [settings]),
            model_config=SimpleNamespace(max_model_len=max_model_len),
        )
        table = provide_table(executor, config, None)
        assert (None if table is None else table.digest()) == (
            None if executor.given is None else executor.given.digest()
        )
        return table, len(calibrated)

    return run


@pytest.fixture
def messages() -> Iterator[list[str]]:
    """Messages of the plugin's log, which vLLM's configuration keeps from pytest."""
    found: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(f"{record.levelname} {record.getMessage()}")

    handler, before = Handler(), calibrate_at_start.logger.level
    calibrate_at_start.logger.addHandler(handler)
    calibrate_at_start.logger.setLevel(logging.INFO)
    yield found
    calibrate_at_start.logger.removeHandler(handler)
    calibrate_at_start.logger.setLevel(before)


Start = Callable[..., tuple[Any, int]]


def test_first_start_stores_and_the_second_reuses(
    start: Start, settings: CalibrationSettings, messages: list[str]
) -> None:
    table, calibrated = start()
    assert calibrated == 1
    assert settings.store is not None
    assert Path(settings.store).read_bytes() == table_to_bytes(table)
    assert Path(settings.store).parent.stat().st_mode & 0o077 == 0
    assert len(messages) == 1
    expected = (
        r"INFO LongMamba: calibrated in \d+\.\d s on 5 sequences of the training length of 8 tokens, 2 of 6 channels"
    )
    assert re.fullmatch(rf"{expected} are global; stored in {re.escape(settings.store)}", messages[0])
    again, calibrated = start()
    assert calibrated == 0
    assert again.digest() == table.digest()
    assert messages[1] == f"INFO LongMamba: thresholds from {settings.store}, made at an earlier start"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_cache_that_takes_nothing(
    code: int, start: Start, settings: CalibrationSettings, messages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(code, "no")

    monkeypatch.setattr("vllm_longmamba.tables.storage.os.fsync", fsync)
    table, calibrated = start()
    assert (calibrated, table.digest()) == (1, small_table().digest())
    assert settings.store is not None
    assert list(Path(settings.store).parent.iterdir()) == []
    assert "WARNING LongMamba: the table cannot be stored, the next start will calibrate again" in messages[0]
    assert messages[1].endswith("; not stored")


def test_a_cache_folder_that_cannot_be_made(start: Start, settings: CalibrationSettings, messages: list[str]) -> None:
    assert settings.store is not None
    Path(settings.store).parent.parent.write_text("a file where the folder should be")
    assert start()[1] == 1
    assert messages[0].startswith("WARNING LongMamba: the table cannot be stored")


@pytest.mark.parametrize("damage", ["cut", "other weights", "writable by others", "folder writable by others"])
def test_a_stored_table_that_cannot_be_used_is_made_again(
    damage: str, start: Start, settings: CalibrationSettings, messages: list[str]
) -> None:
    assert settings.store is not None
    path = Path(settings.store)
    path.parent.mkdir(parents=True, mode=0o755)
    save_table(small_table(weights_fingerprint=("a" if damage == "other weights" else "f") * 64, seed=7), path)
    path.chmod(0o666 if damage == "writable by others" else 0o644)
    path.parent.chmod(0o777 if damage == "folder writable by others" else 0o755)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:100])
    assert start()[1] == 1
    made = load_table(path).metadata
    assert (made.weights_fingerprint, made.seed) == ("f" * 64, 0)
    assert ("may be written by others" in messages[0]) is damage.endswith("by others")


def test_without_a_store(start: Start, settings: CalibrationSettings, tmp_path: Path) -> None:
    assert start(replace(settings, store=None))[1] == 1
    assert list(tmp_path.iterdir()) == []


def test_several_tables(start: Start, settings: CalibrationSettings, tmp_path: Path) -> None:
    """Each is stored, and the engine goes on with the first."""
    each = [replace(settings, seed=seed, store=str(tmp_path / f"{seed}.safetensors")) for seed in (3, 4)]
    table, calibrated = start(*each)
    assert (calibrated, table.metadata.seed) == (2, 3)
    assert [load_table(str(one.store)).metadata.seed for one in each] == [3, 4]


def test_no_prompt_can_be_long_enough(start: Start, messages: list[str]) -> None:
    """A hybrid's max_model_len may be fitted to the memory after the front end's decision."""
    assert start(max_model_len=10) == (None, 0)
    assert "training length of 8 tokens covers prompts of up to max_model_len 10 tokens" in messages[0]
    assert start(max_model_len=11)[1] == 1


def test_where_there_is_a_table() -> None:
    config = SimpleNamespace(additional_config={"longmamba": {"table": "t"}})
    assert provide_table(Executor(), config, None) is None
