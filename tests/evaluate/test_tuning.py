"""The search: which settings are the same, which is the best, what optuna proposes, and that a second one goes on."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from small_tables import small_table

from vllm_longmamba.evaluate.tuning import (
    STUDY,
    Candidate,
    Score,
    candidate,
    choose,
    parts_of,
    plain,
    search,
    search_unfiltered,
)
from vllm_longmamba.evaluate.tuning_report import summarize_tuning, tuning_markdown
from vllm_longmamba.evaluate.tuning_tables import Grid, TriedTable
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
    )


def test_candidate() -> None:
    # Retentions 1e-6, 1e-3 and 1 in each of two layers.
    assert [candidate(TABLES[0], theta).global_channels for theta in (1e-9, 1e-4, 1e-2, 1.0)] == [6, 4, 2, 0]
    assert candidate(TABLES[0], 1e-4).thresholds == candidate(TABLES[0], 1e-5).thresholds
    assert candidate(TABLES[0], 1e-4).thresholds != candidate(TABLES[0], 1e-2).thresholds
    assert (plain(TABLES).min_retention, plain(TABLES).global_channels) == (1.0, 0)
    assert plain(TABLES).thresholds == plain(TABLES[1:]).thresholds
    assert candidate(TABLES[0], 1e-4, 64).thresholds != candidate(TABLES[0], 1e-4).thresholds
    assert candidate(TABLES[0], 1e-4, 64).unfiltered_end == 64


def test_label() -> None:
    assert candidate(TABLES[1], 1e-4).label() == "C 20, theta 0.0001"
    assert candidate(CLOSED[0], 0.05).label() == "budget 0.5, theta 0.05"
    assert candidate(CLOSED[0], 0.05, 4).label() == "budget 0.5, unfiltered end 4, theta 0.05"
    assert plain(CLOSED).label() == "plain"


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


class Best:
    """Best at C = 20, theta = 1e-3 and an end of 4 tokens; keeps what it was asked, and stops where it is told to."""

    def __init__(self, fail_after: int | None = None) -> None:
        self.asked: list[tuple[float | None, float, int]] = []
        self._fail_after = fail_after

    def __call__(self, setting: Candidate) -> Score:
        if len(self.asked) == self._fail_after:
            raise KeyboardInterrupt
        self.asked.append((setting.clamp_percent, setting.min_retention, setting.unfiltered_end))
        far = abs(np.log10(setting.min_retention) + 3) + (setting.clamp_percent == 5.0) + (setting.unfiltered_end != 4)
        return scored(setting, 1.0, float(far))


def grid(further: int, ends: tuple[int, ...] = (0,)) -> Grid:
    return Grid("paper", thetas=THETAS, clamp_percents=[5.0, 20.0], further=further, unfiltered_ends=ends)


def test_search(tmp_path: Path) -> None:
    score = Best()
    scores = search(score, TABLES, grid(5, (0, 4)), tmp_path, "key")
    assert score.asked[0][1] == 1.0
    of_grid = [(clamp, theta, end) for clamp in (5.0, 20.0) for end in (0, 4) for theta in THETAS]
    assert score.asked[1:13] == of_grid
    # Each of its proposals is new, within the grid's range, and one of the tables and ends.
    proposed = score.asked[13:]
    assert len(set(score.asked)) == len(scores) == len(score.asked) == 18
    assert all(min(THETAS) <= theta <= max(THETAS) for _, theta, _ in proposed)
    assert {clamp for clamp, *_ in proposed} <= {5.0, 20.0}
    assert [one.candidate.label() for one in scores[:2]] == ["plain", "C 5, theta 1e-09"]
    best = choose(scores[1:])
    assert (best.candidate.clamp_percent, best.candidate.unfiltered_end) == (20.0, 4)
    assert best.loss["loss"] <= 1.0


@pytest.mark.parametrize("fail_after", [4, 9])
def test_a_second_search_goes_on(fail_after: int, tmp_path: Path) -> None:
    """Interrupted in the grid, or in what optuna proposes: as many settings in the end, and no study is begun anew."""
    with pytest.raises(KeyboardInterrupt):
        search(Best(fail_after), TABLES, grid(4), tmp_path, "key")
    first = search(Best(), TABLES, grid(4), tmp_path, "key")
    assert len(first) == 1 + 2 * len(THETAS) + 4
    (tmp_path / "whole").mkdir()
    assert search(Best(), TABLES, grid(4), tmp_path / "whole", "key") == first
    assert [one.candidate for one in search(Best(), TABLES, grid(4), tmp_path, "key")] == [
        one.candidate for one in first
    ]
    more = search(Best(), TABLES, grid(6), tmp_path, "key")
    assert [one.candidate for one in more[: len(first)]] == [one.candidate for one in first]
    assert len(more) == len(first) + 2
    assert len(optuna.get_all_study_names(f"sqlite:///{tmp_path / STUDY}")) == 1
    # Other texts are another study.
    search(Best(), TABLES, grid(0), tmp_path, "another key")
    assert len(optuna.get_all_study_names(f"sqlite:///{tmp_path / STUDY}")) == 2


def test_a_foreign_file_in_the_place_of_the_study_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / STUDY).write_bytes(b"precious")
    with pytest.raises(ValueError, match=r"tuning\.sqlite: not written by longmamba"):
        search(Best(), TABLES, grid(0), tmp_path, "key")
    assert (tmp_path / STUDY).read_bytes() == b"precious"


@pytest.mark.parametrize(("share", "loss"), [(0.5, None), (None, 1.5)], ids=["keys only", "text only"])
def test_search_by_one_score(share: float | None, loss: float | None, tmp_path: Path) -> None:
    scores = search(lambda setting: scored(setting, share, loss), TABLES, grid(2), tmp_path, "key")
    assert len(scores) == 1 + 2 * len(THETAS) + 2


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
    report = {**HEAD, **summarize_tuning([scored(plain(TABLES), 0.1, 2.0), best, *scores], chosen)}
    text = tuning_markdown(report, "T")
    assert "Best: C 5, theta 0.0001, without 0.2, 1.2. " in text
    assert "| theta | unfiltered | global channels |" in text
    assert "| **0.0001** | **0.2, 1.2** | 2 | 1.00 " in text
    assert "| 0.0001 | - | 4 | 1.00 " in text


def test_parts_are_channels_or_layers() -> None:
    assert parts_of(TABLES[0].table, 1e-4) == ["0.1", "0.2", "1.1", "1.2"]
    many = small_table(layers=(0, 3), channels=600)
    assert parts_of(many, 1e-4) == ["0", "3"]


def test_search_of_the_closed_loop(tmp_path: Path) -> None:
    of_loop = Grid("closed-loop", thetas=[0.05, 0.5], budgets=[0.5, 1.0])
    scores = search(lambda setting: scored(setting, 1.0, 2.0), CLOSED, of_loop, tmp_path, "key")
    tried = [(one.candidate.table, one.candidate.budget, one.candidate.min_retention) for one in scores[1:]]
    assert tried == [
        ("budget0.5-theta0.05", 0.5, 0.05),
        ("budget0.5-theta0.5", 0.5, 0.5),
        ("budget1.0-theta0.05", 1.0, 0.05),
        ("budget1.0-theta0.5", 1.0, 0.5),
    ]
    assert {one.candidate.clamp_percent for one in scores} == {None}


HEAD = {"model": "m", "command": "c", "hardware": "h", "methods": {"model": {"weights": "w"}}, "settings": {}}


def report_of(scores: list[Score]) -> dict[str, Any]:
    report = {**HEAD, **summarize_tuning(scores, choose(scores[1:]))}
    assert json.loads(json.dumps(report)) == report
    return report


def rows_of(text: str, cells: int) -> list[list[str]]:
    return [[cell.strip(" |") for cell in line.split(" | ")[:cells]] for line in text.splitlines() if line[:2] == "| "]


def test_tuning_report() -> None:
    settings = [candidate(table, theta) for table in TABLES for theta in (1e-4, 1e-2)]
    tried = [scored(setting, 0.9, 1.5 - number / 10) for number, setting in enumerate(settings)]
    report = report_of([scored(plain(TABLES), 0.1, 2.0), *reversed(tried)])
    assert (report["best"]["clamp_percent"], report["best"]["min_retention"]) == (20.0, 0.01)
    text = tuning_markdown(report, "Tuning: m")
    assert text.startswith("# Tuning: m\n\nBest: C 20, theta 0.01. ")
    assert "| plain |  | 0 | 0.10 (0.00 to 0.20) | 2.000 (1.900 to 2.100) | 7.39 | +0.000 (-0.100 to +0.100) |" in text
    assert "| 5 | 0.0001 | 4 | 0.90 (0.80 to 1.00) | 1.500 " in text
    assert "| **20** | **0.01** | 2 | 0.90 (0.80 to 1.00) | 1.200 " in text


def one_theta(clamp: float, budget: float) -> TriedTable:
    of_table: dict[str, Any] = {"method": "paper"} if clamp else {"method": "unclamped", "budget": budget}
    return TriedTable(Path(f"C{clamp}-{budget}"), small_table(clamp_percent=clamp, **of_table), [0.1])


def test_tuning_report_of_unfiltered_ends() -> None:
    tables = [one_theta(0.0, budget) for budget in (0.25, 1.0)]
    settings = [candidate(one, 0.1, end) for one in tables for end in (0, 4)]
    losses = [1.6, 1.4, 1.5, 1.45]
    tried = [scored(setting, 0.9, loss) for setting, loss in zip(settings, losses, strict=True)]
    report = report_of([scored(plain(tables), 0.1, 1.9), *tried])
    text = tuning_markdown(report, "T")
    assert "Best: C 0, budget 0.25, unfiltered end 4, theta 0.1. " in text
    header, _, *rows = rows_of(text, 3)
    assert header == ["budget", "unfiltered end", "theta"]
    assert [row[:2] for row in rows] == [["plain", ""], ["0.25", "0"], ["**0.25**", "**4**"], ["1", "0"], ["1", "4"]]


def test_tuning_report_of_budgets_without_a_clamp() -> None:
    tables = [one_theta(5.0, 1.0), one_theta(0.0, 1.0), one_theta(0.0, 2.0)]
    found = [0.5, 0.8, 0.9]
    tried = [scored(candidate(one, 0.1), share, 1.5) for one, share in zip(tables, found, strict=True)]
    report = report_of([scored(plain(tables), 0.1, 1.4), *tried])
    text = tuning_markdown(report, "T")
    assert "Best: C 0, budget 2, theta 0.1. " in text
    header, _, *rows = rows_of(text, 4)
    assert header == ["C (%)", "budget", "theta", "global channels"]
    assert rows == [
        ["plain", "", "", "0"],
        ["0", "1", "0.1", "2"],
        ["**0**", "**2**", "**0.1**", "2"],
        ["5", "1", "0.1", "2"],
    ]


def test_tuning_report_of_the_closed_loop() -> None:
    # A smaller loss with the larger theta, and a key less with the largest budget.
    scores = [scored(plain(CLOSED), 0.1, 1.4)]
    for one in reversed(CLOSED):
        setting = candidate(one, one.thetas[0])
        scores.append(scored(setting, 1.0 - 0.1 * (setting.budget == 1.0), 1.6 - 0.1 * setting.min_retention))
    report = report_of(scores)
    text = tuning_markdown(report, "T")
    assert "Best: budget 0.5, theta 0.5." in text
    assert [row for row in rows_of(text, 2)[2:]] == [
        ["plain", ""],
        ["0.5", "0.05"],
        ["**0.5**", "**0.5**"],
        ["1", "0.05"],
        ["1", "0.5"],
    ]
