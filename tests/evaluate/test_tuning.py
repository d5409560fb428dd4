"""The search: which settings are the same, which is the best, where the finer grid lies."""

import json
from pathlib import Path

import numpy as np
import pytest
from small_tables import small_table

from vllm_longmamba.calibrate import CalibrationSettings
from vllm_longmamba.evaluate.tuning import Candidate, Score, between_neighbours, candidate, choose, plain, search
from vllm_longmamba.evaluate.tuning_report import draw_tuning, summarize_tuning, tuning_markdown
from vllm_longmamba.evaluate.tuning_run import TuningSettings

TABLES = [small_table(clamp_percent=clamp) for clamp in (5.0, 20.0)]


def scored(setting: Candidate, share: float | None, loss: float | None) -> Score:
    return Score(
        candidate=setting,
        found=None if share is None else {"share": share, "low": share - 0.1, "high": share + 0.1},
        loss=None if loss is None else {"loss": loss, "low": loss - 0.1, "high": loss + 0.1, "perplexity": np.e**loss},
        difference=None if loss is None else {"loss": loss - 2.0, "low": loss - 2.1, "high": loss - 1.9},
        by_length={},
    )


def test_candidate() -> None:
    # Retentions 1e-6, 1e-3 and 1 in each of two layers.
    assert [candidate(TABLES[0], theta).global_channels for theta in (1e-9, 1e-4, 1e-2, 1.0)] == [6, 4, 2, 0]
    assert candidate(TABLES[0], 1e-4).thresholds == candidate(TABLES[0], 1e-5).thresholds
    assert candidate(TABLES[0], 1e-4).thresholds != candidate(TABLES[0], 1e-2).thresholds
    assert plain(TABLES[0]).is_plain
    assert plain(TABLES[0]).global_channels == 0
    assert not candidate(TABLES[0], 0.1).is_plain


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        # (theta, share found, loss)
        ([(0.1, 0.5, 1.0), (0.2, 0.9, 2.0), (0.3, 0.86, 1.9)], 0.3),
        ([(0.1, 0.5, 1.0), (0.2, 0.9, 2.0), (0.3, 0.84, 1.9)], 0.2),
        ([(0.1, None, 1.0), (0.2, None, 2.0)], 0.1),
        ([(0.1, 0.88, None), (0.2, 0.9, None), (0.3, 0.9, None), (0.05, 0.9, None)], 0.3),
        ([(0.1, 0.0, 1.5), (0.2, 0.0, 1.4)], 0.2),
    ],
    ids=["about as many keys", "fewer keys", "text only", "keys only", "no keys at all"],
)
def test_choose(scores: list[tuple[float, float | None, float | None]], best: float) -> None:
    assert (
        choose([scored(candidate(TABLES[0], theta), *rest) for theta, *rest in scores]).candidate.min_retention == best
    )


def test_between_neighbours() -> None:
    assert between_neighbours(1e-4, [1e-8, 1e-4, 1e-2]) == pytest.approx([1e-6, 1e-3])
    assert between_neighbours(1e-2, [1e-8, 1e-4, 1e-2]) == pytest.approx([1e-3])
    assert between_neighbours(1e-2, [1e-2]) == []


def test_search() -> None:
    asked = []

    def score(setting: Candidate) -> Score:
        asked.append((setting.clamp_percent, setting.min_retention))
        # Best at C = 20 and theta = 1e-3.
        return scored(setting, 1.0, abs(np.log10(setting.min_retention) + 3) + (setting.clamp_percent == 5.0))

    scores = search(score, TABLES, [1e-9, 1e-4, 1e-1], refine=2)
    assert asked[0][1] == 1.0
    assert asked[1:7] == [(clamp, theta) for clamp in (5.0, 20.0) for theta in (1e-9, 1e-4, 1e-1)]
    finer = [theta for clamp, theta in asked[7:]]
    assert {clamp for clamp, _ in asked[7:]} == {20.0}
    assert finer == pytest.approx([10**-6.5, 10**-2.5, 10**-3.25, 10**-1.75])
    assert choose(scores[1:]).candidate.min_retention == pytest.approx(10**-3.25)


def test_tuning_report(tmp_path: Path) -> None:
    settings = [candidate(table, theta) for table in TABLES for theta in (1e-4, 1e-2)]
    scores = [
        scored(plain(TABLES[0]), 0.1, 2.0),
        *(scored(setting, 0.9, 1.5 - n / 10) for n, setting in enumerate(settings)),
    ]
    head = {"model": "m", "command": "c", "hardware": "h", "methods": {"model": {"weights": "w"}}, "settings": {}}
    report = {**head, **summarize_tuning(scores, choose(scores[1:]))}
    assert json.loads(json.dumps(report)) == report
    assert report["best"] == {"clamp_percent": 20.0, "min_retention": 0.01}
    text = tuning_markdown(report, draw_tuning(report, tmp_path))
    assert "| plain |  | 0 | 0.10 (0.00 to 0.20) | 2.000 (1.900 to 2.100) | 7.39 | +0.000 (-0.100 to +0.100) |" in text
    assert "| 5 | 0.0001 | 4 | 0.90 (0.80 to 1.00) | 1.500 " in text
    assert "| **20** | **0.01** | 2 | 0.90 (0.80 to 1.00) | 1.200 " in text
    assert "![tuning.png](tuning.png)" in text
    assert "C = 20 %" in (tmp_path / "tuning.svg").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"thetas": [0.0, 0.1]}, "--thetas must be different numbers between 0 and 1, got 0.0, 0.1"),
        ({"thetas": [0.1, 1.0]}, "--thetas must be"),
        ({"thetas": [0.1, 0.1]}, "--thetas must be different"),
        ({"clamp_percents": [0.0, 100.0]}, "--clamp-percents must be different numbers between 0 and 100"),
    ],
)
def test_tuning_settings_refuse(change: dict[str, list[float]], message: str) -> None:
    correct = {
        "thetas": [0.1],
        "clamp_percents": [0.0, 5.0],
        "refine": 0,
        "held_out": [],
        "calibration_texts": [],
        "calibration": CalibrationSettings(),
        "passkeys": True,
        "perplexity": True,
        "lengths": None,
        "depths": 1,
        "seeds": [0],
        "windows": 1,
        "scored_tokens": 100,
    }
    TuningSettings(**correct)
    with pytest.raises(ValueError, match=message):
        TuningSettings(**(correct | change))
