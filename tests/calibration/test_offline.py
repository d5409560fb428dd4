"""Tests of vllm_longmamba/calibration/offline.py without an engine: what it starts, and which tables it takes."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from small_tables import small_table

from vllm_longmamba.calibration.offline import calibrate
from vllm_longmamba.calibration.settings import CALIBRATION_KEY, CalibrationSettings, from_config
from vllm_longmamba.tables import save_table

SETTINGS = CalibrationSettings(train_length=8, max_length=40)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of every engine that was started; each stores tables that tell the seed, and is ended."""
    seen: list[dict[str, Any]] = []

    def start(model: str, **arguments: Any) -> Any:
        seen.append({"model": model, "ended": False, **arguments})
        for settings in from_config(arguments["additional_config"]):
            save_table(small_table(seed=settings.seed), str(settings.store))

        def shutdown(timeout: float) -> None:
            seen[-1]["ended"] = True

        return SimpleNamespace(llm_engine=SimpleNamespace(engine_core=SimpleNamespace(shutdown=shutdown)))

    monkeypatch.setattr("vllm.LLM", start)
    return seen


def test_one_engine_makes_the_table_and_ends(started: list[dict[str, Any]]) -> None:
    asked = replace(SETTINGS, seed=3)
    own = {"longmamba": {"train_length": 8}}
    assert calibrate("m", asked, additional_config=own, dtype="float32").metadata.seed == 3
    (engine,) = started
    config = engine.pop("additional_config")
    assert [replace(each, store=None) for each in from_config(config)] == [asked]
    assert {name: value for name, value in config.items() if name != CALIBRATION_KEY} == own
    # Rows at 8 and 12 tokens: shorter prompts are not filtered, so that the engine would make no table.
    assert engine == {
        "model": "m",
        "ended": True,
        "model_impl": "longmamba",
        "dtype": "float32",
        "max_model_len": 14,
        "max_num_seqs": 1,
    }


def test_a_training_length_that_is_known(started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_longmamba.calibration.offline.find_train_length", _known)
    calibrate("m")
    (settings,) = from_config(started[0]["additional_config"])
    assert settings.train_length == 2048


def _known(model: str, settings: CalibrationSettings, engine_args: dict[str, Any]) -> int:
    assert (model, settings.train_length) == ("m", None)
    return 2048


def test_the_engine_is_as_the_user_asks(started: list[dict[str, Any]]) -> None:
    calibrate("m", SETTINGS, max_model_len=500, max_num_seqs=4)
    assert (started[0]["max_model_len"], started[0]["max_num_seqs"]) == (500, 4)
