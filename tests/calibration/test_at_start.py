"""Tests of vllm_longmamba/calibration/at_start.py without an engine: what is stored, what is reused, what may fail."""

import errno
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from calibration_plans import PAPER_PLAN
from small_tables import small_table

import vllm_longmamba.calibration.at_start as calibrate_at_start
from vllm_longmamba.calibration.at_start import provide_table
from vllm_longmamba.calibration.plan import PLAN_KEY, CalibrationPlan
from vllm_longmamba.calibration.worker import use_table
from vllm_longmamba.tables import ThresholdTable, load_table, save_table, table_from_bytes, table_to_bytes


@pytest.fixture
def plan(tmp_path: Path) -> CalibrationPlan:
    store = tmp_path / "cache" / "vllm_longmamba" / "table.safetensors"
    return replace(PAPER_PLAN, train_length=8, max_length=20, store=str(store))


class Executor:
    """Stands for vLLM's executor: remembers the table that the workers are given."""

    given: ThresholdTable | None = None

    def collective_rpc(self, method: Callable[..., Any], args: tuple[Any, ...]) -> None:
        assert method is use_table
        self.given = table_from_bytes(args[0])


@pytest.fixture
def start(plan: CalibrationPlan, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Any, int]]:
    """Function: starts an engine; what the workers got, and how often it calibrated."""
    from dataclasses import asdict

    def run(plan: CalibrationPlan = plan, max_model_len: int = 100) -> tuple[Any, int]:
        calibrated = []

        def calibrate(*args: Any) -> ThresholdTable:
            calibrated.append(args)
            return small_table()

        monkeypatch.setattr(calibrate_at_start, "_calibrate", calibrate)
        executor = Executor()
        config = SimpleNamespace(
            additional_config={PLAN_KEY: asdict(plan)}, model_config=SimpleNamespace(max_model_len=max_model_len)
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


def test_first_start_stores_and_the_second_reuses(start: Start, plan: CalibrationPlan, messages: list[str]) -> None:
    table, calibrated = start()
    assert calibrated == 1
    assert plan.store is not None
    assert Path(plan.store).read_bytes() == table_to_bytes(table)
    assert len(messages) == 1
    assert messages[0].startswith("INFO LongMamba: calibrated in 0.0 s on 5 sequences of the training length of 8 tok")
    assert messages[0].endswith(f"2 of 6 channels are global; stored in {plan.store}")
    again, calibrated = start()
    assert calibrated == 0
    assert again.digest() == table.digest()
    assert messages[1] == f"INFO LongMamba: thresholds from {plan.store}, made at an earlier start"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_cache_that_takes_nothing(
    code: int, start: Start, plan: CalibrationPlan, messages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(code, "no")

    monkeypatch.setattr("vllm_longmamba.tables.storage.os.fsync", fsync)
    table, calibrated = start()
    assert (calibrated, table.digest()) == (1, small_table().digest())
    assert plan.store is not None
    assert list(Path(plan.store).parent.iterdir()) == []
    assert "WARNING LongMamba: the table cannot be stored, the next start will calibrate again" in messages[0]
    assert messages[1].endswith("; not stored")


def test_a_cache_folder_that_cannot_be_made(start: Start, plan: CalibrationPlan, messages: list[str]) -> None:
    assert plan.store is not None
    Path(plan.store).parent.parent.write_text("a file where the folder should be")
    assert start()[1] == 1
    assert messages[0].startswith("WARNING LongMamba: the table cannot be stored")


@pytest.mark.parametrize("damage", ["cut", "other weights"])
def test_a_stored_table_that_cannot_be_used_is_made_again(damage: str, start: Start, plan: CalibrationPlan) -> None:
    assert plan.store is not None
    path = Path(plan.store)
    path.parent.mkdir(parents=True)
    save_table(small_table(weights_fingerprint="a" * 64), path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:100])
    assert start()[1] == 1
    assert load_table(path).metadata.weights_fingerprint == "f" * 64


def test_without_a_store(start: Start, plan: CalibrationPlan, tmp_path: Path) -> None:
    assert start(replace(plan, store=None))[1] == 1
    assert list(tmp_path.iterdir()) == []


def test_no_prompt_can_be_long_enough(start: Start) -> None:
    """A hybrid's max_model_len may be fitted to the memory after the front end's decision."""
    assert start(max_model_len=10) == (None, 0)
    assert start(max_model_len=11)[1] == 1


def test_without_a_plan() -> None:
    config = SimpleNamespace(additional_config={"longmamba": {"table": "t"}})
    assert provide_table(Executor(), config, None) is None
