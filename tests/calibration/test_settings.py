"""Tests of vllm_longmamba/calibration/settings.py: one object that says how a table is made."""

import json
import pickle
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from calibration_settings import PAPER_SETTINGS

import vllm_longmamba.calibration.settings as calibration_settings
from vllm_longmamba.calibration.settings import CalibrationSettings, from_config, to_config
from vllm_longmamba.options import CALIBRATION_METHODS, options_from_config
from vllm_longmamba.tables import METHODS


@pytest.mark.parametrize(
    ("change", "is_another"),
    [
        ({"dtype": "bfloat16"}, True),
        ({"quantization": "fp8"}, True),
        ({"train_length": 97}, True),
        ({"max_length": 1001}, True),
        ({"num_sequences": 6}, True),
        ({"clamp_percent": 5.5}, True),
        ({"seed": 1}, True),
        ({"unfiltered_end": 4}, True),
        ({"corpus": "a text (blake3 01)"}, True),
        ({"model_id": "renamed"}, False),
        ({"texts": ("/elsewhere/text",)}, False),
        ({"store": "/elsewhere"}, False),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_key(change: dict[str, Any], is_another: bool) -> None:
    assert (replace(PAPER_SETTINGS, **change).key() != PAPER_SETTINGS.key()) is is_another
    assert len(PAPER_SETTINGS.key()) == 32


@pytest.mark.parametrize("name", ["_VERSION", "FORMAT_VERSION"])
def test_key_of_another_version(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A release that calibrates differently does not take what an earlier one has stored."""
    before = PAPER_SETTINGS.key()
    monkeypatch.setattr(calibration_settings, name, 99)
    assert PAPER_SETTINGS.key() != before


def test_settings_survive_the_config() -> None:
    settings = replace(PAPER_SETTINGS, texts=("/a", "/b"), store="/c")
    unclamped = replace(settings, method="unclamped", clamp_percent=0.0, budget=0.5)
    assert from_config(json.loads(json.dumps(to_config([settings, unclamped])))) == [settings, unclamped]
    assert pickle.loads(pickle.dumps(unclamped)) == unclamped
    assert from_config({}) == from_config(None) == []


def test_metadata_say_what_the_settings_say() -> None:
    settings = replace(
        PAPER_SETTINGS,
        method="unclamped",
        clamp_percent=0.0,
        num_sequences=7,
        seed=3,
        min_retention=0.3,
        budget=0.5,
        unfiltered_end=9,
    )
    told, given = asdict(settings.metadata()), asdict(settings)
    common = told.keys() & given.keys()
    assert told.keys() - common == {"tool_version", "format_version"}
    assert {name: told[name] for name in common} == {name: given[name] for name in common}


def test_empty_table() -> None:
    table = PAPER_SETTINGS.empty_table({0: 4, 7: 2})
    assert table.row_lengths.tolist() == PAPER_SETTINGS.row_lengths.tolist()
    for layer, channels in ((0, 4), (7, 2)):
        thresholds = table.thresholds(layer)
        assert thresholds.shape == (len(PAPER_SETTINGS.row_lengths), channels)
        assert bool((thresholds == -1.0).all())


def test_empty_table_lies_in_host_memory_while_vllm_builds_a_model_on_its_device() -> None:
    with torch.device("meta"):
        table = PAPER_SETTINGS.empty_table({0: 2})
    assert table.layers[0].retention.device.type == table.layers[0].dt_threshold.device.type == "cpu"


@pytest.mark.parametrize(("max_model_len", "expected"), [(96, False), (100, False), (120, False), (121, True)])
def test_can_filter(max_model_len: int, expected: bool) -> None:
    # Rows at 96 and 144 tokens: the nearest to 120 is still the first.
    assert PAPER_SETTINGS.can_filter(max_model_len) is expected
    assert (PAPER_SETTINGS.empty_table({0: 1}).row_of(max_model_len) > 0) is expected


@pytest.mark.parametrize(("max_model_len", "expected"), [(3000, False), (3001, True)])
def test_can_filter_a_prompt_with_an_answer(max_model_len: int, expected: bool) -> None:
    # Rows at 2999 and 3000 tokens.
    assert replace(PAPER_SETTINGS, train_length=2999, max_length=4000).can_filter(max_model_len) is expected


def test_settings_refuse() -> None:
    with pytest.raises(ValueError, match="method must be one of unclamped, paper, got 'closed-loop'"):
        CalibrationSettings(method="closed-loop")
    with pytest.raises(ValueError, match="budget must be a factor above 0, got -1"):
        CalibrationSettings(budget=-1)
    with pytest.raises(ValueError, match=r"method unclamped has no clamp, got clamp_percent 5"):
        CalibrationSettings(method="unclamped", clamp_percent=5)


@pytest.mark.parametrize(
    ("settings", "method", "theta", "clamps"),
    [
        (CalibrationSettings(), "unclamped", 0.05, (0, 0)),
        (CalibrationSettings(clamp_percent=0), "unclamped", 0.05, (0, 0)),
        (CalibrationSettings(clamp_percent=3), "paper", 0.01, (3, 3)),
        (CalibrationSettings(method="paper"), "paper", 0.01, (20, 5)),
        (CalibrationSettings(method="paper", clamp_percent=0, min_retention=0.2), "paper", 0.2, (0, 0)),
    ],
)
def test_defaults_of_a_method(
    settings: CalibrationSettings, method: str, theta: float, clamps: tuple[float, float]
) -> None:
    assert (settings.method, settings.theta) == (method, theta)
    assert (settings.clamp("MambaForCausalLM"), settings.clamp("Mamba2ForCausalLM")) == clamps


def test_settings_refuse_a_budget_or_an_end() -> None:
    with pytest.raises(ValueError, match=r"method paper has no budget but that of the training length, got 0\.5"):
        CalibrationSettings(method="paper", budget=0.5)
    assert CalibrationSettings(method="paper", budget=1, unfiltered_end=3).unfiltered_end == 3
    for end in (-1, 1.5, True):
        with pytest.raises(ValueError, match="CalibrationSettings: unfiltered_end must be a number of tokens"):
            CalibrationSettings(unfiltered_end=end)  # type: ignore[arg-type]


def test_option() -> None:
    assert CALIBRATION_METHODS == METHODS
    assert options_from_config({}).calibration_method == "unclamped"
    assert options_from_config({"longmamba": {"calibration_method": "paper"}}).calibration_method == "paper"
    with pytest.raises(ValueError, match='calibration_method must be "unclamped" or "paper", but is'):
        options_from_config({"longmamba": {"calibration_method": "closed-loop"}})


def test_methods_make_other_tables() -> None:
    paper = PAPER_SETTINGS
    unclamped = replace(paper, method="unclamped", clamp_percent=0.0)
    methods = (paper, unclamped, replace(paper, clamp_percent=0.0), replace(unclamped, budget=2.0))
    assert len({each.key() for each in methods}) == len(methods)
    assert [(each.metadata().method, each.metadata().budget) for each in methods[1::2]] == [
        ("unclamped", 0.5),
        ("unclamped", 2.0),
    ]
