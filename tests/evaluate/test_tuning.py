"""The search: which settings are the same, which is the best, where the finer grid lies."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_tables import small_table

from vllm_longmamba.evaluate.tuning import (
    Candidate,
    Score,
    TriedTable,
    between_neighbours,
    candidate,
    choose,
    plain,
    search,
)
from vllm_longmamba.evaluate.tuning_report import draw_tuning, summarize_tuning, tuning_markdown
from vllm_longmamba.evaluate.tuning_unfiltered import parts_of, search_unfiltered
from vllm_longmamba.tables import ClosedLoop

THETAS = (1e-9, 1e-4, 1e-1)
TABLES = [TriedTable(Path(f"C{clamp}"), small_table(clamp_percent=clamp), THETAS) for clamp in (5.0, 20.0)]
CLOSED = [
    TriedTable(
        Path(f"budget{budget}-theta{theta}"),
        small_table(
            min_retention=theta,
            method="closed-loop",
            closed_loop=ClosedLoop(combine="median", lengths=(12,), text_tokens=100, budget=budget),
        ),
        [theta],
    )
    for budget in (0.5, 1.0)
    for theta in (0.05, 0.5)
]


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
    with_end = TriedTable(Path("end"), small_table(clamp_percent=5.0, unfiltered_end=64), THETAS)
    assert candidate(with_end, 1e-4).thresholds != candidate(TABLES[0], 1e-4).thresholds
    assert [candidate(one, 1e-4).unfiltered_end for one in (TABLES[0], with_end)] == [0, 64]


def test_label() -> None:
    assert candidate(TABLES[1], 1e-4).label() == "C 20, theta 0.0001"
    assert candidate(CLOSED[0], 0.05).label() == "budget 0.5, theta 0.05"
    assert plain(CLOSED[0]).label() == "plain"


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

    scores = search(score, TABLES, refine=2)
    assert asked[0][1] == 1.0
    assert asked[1:7] == [(clamp, theta) for clamp in (5.0, 20.0) for theta in THETAS]
    finer = [theta for clamp, theta in asked[7:]]
    assert {clamp for clamp, _ in asked[7:]} == {20.0}
    assert finer == pytest.approx([10**-6.5, 10**-2.5, 10**-3.25, 10**-1.75])
    assert choose(scores[1:]).candidate.min_retention == pytest.approx(10**-3.25)


def test_search_unfiltered() -> None:
    """At theta 1e-4, channels 1 and 2 of two layers are global; the filter of three of them costs text."""
    cost = {"0.1": 0.1, "0.2": 0.4, "1.1": -0.2, "1.2": 0.2}
    asked = []

    def score_text(setting: Candidate) -> Score:
        return scored(setting, None, 2.0 - sum(cost[part] for part in setting.unfiltered))

    def score(setting: Candidate) -> Score:
        asked.append(setting.unfiltered)
        return scored(setting, 1.0 - 0.5 * ("0.1" in setting.unfiltered), score_text(setting).loss["loss"])

    best = score(candidate(TABLES[0], 1e-4))
    scores = search_unfiltered(score, score_text, TABLES[0], best)
    assert asked[1:] == [("0.2",), ("0.2", "1.2"), ("0.2", "1.2", "0.1")]
    assert [one.candidate.global_channels for one in scores] == [3, 2, 1]
    assert len({one.candidate.thresholds for one in (best, *scores)}) == 4
    # The last one has the smallest loss, but half the keys.
    chosen = choose([best, *scores])
    assert chosen.candidate.unfiltered == ("0.2", "1.2")
    assert chosen.candidate.label() == "C 5, theta 0.0001, without 0.2, 1.2"
    report = {**HEAD, **summarize_tuning([scored(plain(TABLES[0]), 0.1, 2.0), best, *scores], chosen)}
    assert json.loads(json.dumps(report)) == report
    text = tuning_markdown(report, [])
    assert "Best: clamp_percent 5, min_retention 0.0001, without 0.2, 1.2. " in text
    assert "| C (%) | theta | unfiltered | global channels |" in text
    assert "| **5** | **0.0001** | **0.2, 1.2** | 2 | 1.00 " in text
    assert "| 5 | 0.0001 | - | 4 | 1.00 " in text


def test_search_unfiltered_goes_on_from_what_is_left_out() -> None:
    given = candidate(TABLES[0], 1e-4, ["1"])
    tried = []

    def score_text(setting: Candidate) -> Score:
        tried.append(setting.unfiltered)
        return scored(setting, None, 2.0)

    assert search_unfiltered(score_text, score_text, TABLES[0], scored(given, 1.0, 2.0)) == []
    assert tried == [("1", "0.1"), ("1", "0.2")]


def test_parts_are_channels_or_layers() -> None:
    assert parts_of(TABLES[0].table, 1e-4) == ["0.1", "0.2", "1.1", "1.2"]
    many = small_table(layers=(0, 3), channels=600)
    assert parts_of(many, 1e-4) == ["0", "3"]


def test_search_of_the_closed_loop() -> None:
    scores = search(lambda setting: scored(setting, 1.0, 2.0), CLOSED, refine=0)
    tried = [(one.candidate.table, one.candidate.budget, one.candidate.min_retention) for one in scores[1:]]
    assert tried == [
        ("budget0.5-theta0.05", 0.5, 0.05),
        ("budget0.5-theta0.5", 0.5, 0.5),
        ("budget1.0-theta0.05", 1.0, 0.05),
        ("budget1.0-theta0.5", 1.0, 0.5),
    ]
    assert {one.candidate.clamp_percent for one in scores} == {None}


HEAD = {"model": "m", "command": "c", "hardware": "h", "methods": {"model": {"weights": "w"}}, "settings": {}}


def test_tuning_report(tmp_path: Path) -> None:
    settings = [candidate(table, theta) for table in TABLES for theta in (1e-4, 1e-2)]
    scores = [
        scored(plain(TABLES[0]), 0.1, 2.0),
        *(scored(setting, 0.9, 1.5 - n / 10) for n, setting in enumerate(settings)),
    ]
    report = {**HEAD, **summarize_tuning(scores, choose(scores[1:]))}
    assert json.loads(json.dumps(report)) == report
    assert report["best"] == {"clamp_percent": 20.0, "min_retention": 0.01}
    text = tuning_markdown(report, draw_tuning(report, tmp_path))
    assert text.startswith("# Tuning\n\nBest: clamp_percent 20, min_retention 0.01. ")
    assert "| plain |  | 0 | 0.10 (0.00 to 0.20) | 2.000 (1.900 to 2.100) | 7.39 | +0.000 (-0.100 to +0.100) |" in text
    assert "| 5 | 0.0001 | 4 | 0.90 (0.80 to 1.00) | 1.500 " in text
    assert "| **20** | **0.01** | 2 | 0.90 (0.80 to 1.00) | 1.200 " in text
    assert "![tuning.png](tuning.png)" in text
    assert "C = 20 %" in (tmp_path / "tuning.svg").read_text()
    # Reports that were written before the closed loop know neither budgets nor names of tables.
    before = json.loads(json.dumps(report))
    for score in [before["plain"], *before["tried"]]:
        del score["candidate"]["budget"], score["candidate"]["table"]
    assert tuning_markdown(before, draw_tuning(before, tmp_path)) == text


def one_theta(clamp: float, budget: float, unfiltered_end: int = 0) -> TriedTable:
    of_table: dict[str, Any] = {"method": "paper"} if clamp else {"method": "unclamped", "budget": budget}
    table = small_table(clamp_percent=clamp, unfiltered_end=unfiltered_end, **of_table)
    return TriedTable(Path(f"C{clamp}-{budget}-{unfiltered_end}"), table, [0.1])


def test_tuning_report_of_unfiltered_ends(tmp_path: Path) -> None:
    tables = [one_theta(0.0, budget, end) for budget in (0.25, 1.0) for end in (0, 4)]
    losses = [1.6, 1.4, 1.5, 1.45]
    scores = [scored(candidate(one, 0.1), 0.9, loss) for one, loss in zip(tables, losses, strict=True)]
    report = {**HEAD, **summarize_tuning([scored(plain(tables[0]), 0.1, 1.9), *scores], choose(scores))}
    assert report["best"] == {"clamp_percent": 0.0, "budget": 0.25, "unfiltered_end": 4, "min_retention": 0.1}
    text = tuning_markdown(report, draw_tuning(report, tmp_path))
    assert "Best: clamp_percent 0, budget 0.25, unfiltered_end 4, min_retention 0.1. " in text
    header, _, *rows = [line.split(" | ")[:4] for line in text.splitlines() if line.startswith("| ")]
    assert header == ["| C (%)", "budget", "unfiltered end", "theta"]
    assert [row[1:3] for row in rows] == [["", ""], ["0.25", "0"], ["**0.25**", "**4**"], ["1", "0"], ["1", "4"]]
    assert "C = 0 %, budget 0.25, unfiltered end 4" in (tmp_path / "tuning.svg").read_text()


def test_tuning_report_of_budgets_without_a_clamp(tmp_path: Path) -> None:
    tables = [one_theta(5.0, 1.0), one_theta(0.0, 1.0), one_theta(0.0, 2.0)]
    found = [0.5, 0.8, 0.9]
    scores = [scored(candidate(one, 0.1), share, 1.5) for one, share in zip(tables, found, strict=True)]
    report = {**HEAD, **summarize_tuning([scored(plain(tables[0]), 0.1, 1.4), *scores], choose(scores))}
    assert report["best"] == {"clamp_percent": 0.0, "budget": 2.0, "min_retention": 0.1}
    text = tuning_markdown(report, draw_tuning(report, tmp_path))
    assert text.startswith("# Tuning\n\nBest: clamp_percent 0, budget 2, min_retention 0.1. ")
    header, _, *rows = [line.split(" | ")[:4] for line in text.splitlines() if line.startswith("| ")]
    assert header == ["| C (%)", "budget", "theta", "global channels"]
    assert rows == [
        ["| plain", "", "", "0"],
        ["| 0", "1", "0.1", "2"],
        ["| **0**", "**2**", "**0.1**", "2"],
        ["| 5", "1", "0.1", "2"],
    ]
    assert "C = 0 %, budget 2" in (tmp_path / "tuning.svg").read_text()


def test_tuning_report_of_the_closed_loop(tmp_path: Path) -> None:
    # A smaller loss with the larger theta, and a key less with the largest budget.
    scores = [scored(plain(CLOSED[0]), 0.1, 1.4)]
    for one in reversed(CLOSED):
        setting = candidate(one, one.thetas[0])
        scores.append(scored(setting, 1.0 - 0.1 * (setting.budget == 1.0), 1.6 - 0.1 * setting.min_retention))
    report = {**HEAD, **summarize_tuning(scores, choose(scores[1:]))}
    assert json.loads(json.dumps(report)) == report
    assert report["best"] == {"budget": 0.5, "min_retention": 0.5}
    text = tuning_markdown(report, draw_tuning(report, tmp_path))
    assert text.startswith(
        "# Tuning of the closed loop\n\nClosed-loop calibration, for every theta a table of its own. "
    )
    assert "Best: budget 0.5, min_retention 0.5." in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[:2] for row in rows[2:]] == [
        ["| plain", ""],
        ["| 0.5", "0.05"],
        ["| **0.5**", "**0.5**"],
        ["| 1", "0.05"],
        ["| 1", "0.5"],
    ]
    assert "closed loop, budget 0.5" in (tmp_path / "tuning.svg").read_text()
