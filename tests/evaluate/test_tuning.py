"""The search: which settings are the same, which is the best, what optuna proposes, and that a second one goes on."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_tables import small_table

from vllm_longmamba.calibration.settings import CalibrationSettings
from vllm_longmamba.evaluate.tuning import (
    Score,
    Setting,
    Space,
    calibrations,
    choose,
    default_setting,
    in_force,
    search,
)
from vllm_longmamba.evaluate.tuning_report import draw_tuning, summarize_tuning, tuning_markdown

DEFAULT = default_setting(CalibrationSettings(train_length=512))
PLAIN = DEFAULT.plain()
SPACE = Space([1, 2], (0.01, 0.5), [0], 12).including(DEFAULT)


def scored(setting: Setting, share: float = 1.0, loss: float = 2.0) -> Score:
    return Score(
        setting=setting,
        global_channels=2,
        found={"share": share, "low": share - 0.1, "high": share + 0.1},
        loss={"loss": loss, "low": loss - 0.1, "high": loss + 0.1, "perplexity": np.e**loss},
        difference={"loss": loss - 2.0, "low": loss - 2.1, "high": loss - 1.9},
    )


def test_settings_that_are_the_same_model() -> None:
    # Retentions 1e-6, 1e-3 and 1 in each of two layers.
    table = small_table()
    assert in_force(table, Setting(1.0, 1e-4, 0)) == in_force(table, Setting(1.0, 1e-5, 0))
    assert in_force(table, Setting(1.0, 1e-4, 0)) != in_force(table, Setting(1.0, 1e-2, 0))
    assert in_force(table, Setting(1.0, 1e-4, 64)) != in_force(table, Setting(1.0, 1e-4, 0))
    assert table.count_global(PLAIN.min_retention) == 0


def test_labels() -> None:
    assert PLAIN.label() == "plain"
    assert DEFAULT.label() == "budget 0.5, theta 0.05, unfiltered end 256"
    assert Setting(0.25, 1 / 3, 0).label() == "budget 0.25, theta 0.333"


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        # (theta, share found, loss)
        ([(0.1, 0.5, 1.0), (0.2, 0.9, 2.0), (0.3, 0.86, 1.9)], 0.3),
        ([(0.1, 0.5, 1.0), (0.2, 0.9, 2.0), (0.3, 0.84, 1.9)], 0.2),
        ([(0.1, 0.0, 1.5), (0.2, 0.0, 1.4)], 0.2),
        ([(0.1, 0.9, 1.5), (0.2, 0.9, 1.5)], 0.1),
    ],
    ids=["about as many keys", "fewer keys", "no keys at all", "equal ones"],
)
def test_choose(scores: list[tuple[float, float, float]], best: float) -> None:
    of_thetas = [scored(Setting(1.0, theta, 0), share, loss) for theta, share, loss in scores]
    assert choose(of_thetas).setting.min_retention == best


class Best:
    """Best at a budget of 2, theta 0.1 and an end of 256; keeps what it was asked, and stops where it is told to."""

    def __init__(self, fail_after: int | None = None) -> None:
        self.asked: list[Setting] = []
        self._fail_after = fail_after

    def __call__(self, setting: Setting) -> Score:
        if len(self.asked) == self._fail_after:
            raise KeyboardInterrupt
        self.asked.append(setting)
        far = abs(np.log10(setting.min_retention) + 1) + (setting.budget != 2) + (setting.unfiltered_end == 0)
        return scored(setting, 1.0, float(far))


def test_search() -> None:
    score = Best()
    scores = search(score, SPACE, DEFAULT)
    assert score.asked[:2] == [PLAIN, DEFAULT]
    corners = [Setting(budget, 0.05, end) for end in (256, 0) for budget in (0.5, 1, 2)]
    assert score.asked[1:7] == corners
    # Each of the proposals is new, and within the space.
    proposed = score.asked[7:]
    assert len(set(score.asked)) == len(score.asked) == len(scores) == 1 + SPACE.trials
    assert all(0.01 <= one.min_retention <= 0.5 for one in proposed)
    assert {one.budget for one in proposed} <= {0.5, 1.0, 2}
    assert {one.unfiltered_end for one in proposed} <= {0, 256}
    best = choose(scores[1:])
    assert (best.setting.budget, best.setting.unfiltered_end) == (2, 256)
    assert best.loss["loss"] <= 0.31


def test_a_second_search_goes_on() -> None:
    """It asks for the same settings again, whose results are in the store, and then for what was not asked yet."""
    interrupted = Best(fail_after=9)
    with pytest.raises(KeyboardInterrupt):
        search(interrupted, SPACE, DEFAULT)
    whole, longer = Best(), Best()
    search(whole, SPACE, DEFAULT)
    search(longer, replace(SPACE, trials=14), DEFAULT)
    assert interrupted.asked == whole.asked[:9]
    assert longer.asked[: len(whole.asked)] == whole.asked
    assert len(longer.asked) == 15


def test_fewer_trials_than_corners() -> None:
    score = Best()
    search(score, replace(SPACE, trials=1), DEFAULT)
    assert score.asked == [PLAIN, DEFAULT]


def test_the_default_is_in_every_space() -> None:
    space = Space([], (0.05, 0.05), [], 1).including(DEFAULT)
    assert (space.budgets, space.unfiltered_ends) == ((0.5,), (256,))
    space = Space([2, 0.5], (0.05, 0.05), [4, 256], 1).including(DEFAULT)
    assert (space.budgets, space.unfiltered_ends) == ((0.5, 2), (256, 4))


def test_no_table_is_made_twice(tmp_path: Path) -> None:
    """A file of another name is another table; the engine makes those that are not there."""
    text = tmp_path / "text.txt"
    text.write_text("one")
    settings = CalibrationSettings(train_length=8, texts=(str(text),))
    made = calibrations([1.0, 0.25], settings, {"weights": "w"}, tmp_path)
    assert [replace(one, store=None) for one in made] == [replace(settings, budget=budget) for budget in (1.0, 0.25)]
    assert len({one.store for one in made}) == 2
    assert calibrations([2.0, 0.25], settings, {"weights": "w"}, tmp_path)[1] == made[1]
    names = {one.store for one in made}
    names |= {calibrations([1.0], settings, {"weights": "v"}, tmp_path)[0].store}
    names |= {calibrations([1.0], replace(settings, max_length=9), {"weights": "w"}, tmp_path)[0].store}
    text.write_text("two")
    names |= {calibrations([1.0], settings, {"weights": "w"}, tmp_path)[0].store}
    assert len(names) == 5


HEAD = {"model": "m", "command": "c", "hardware": "h", "methods": {"model": {"weights": "w"}}, "settings": {}}


def rows_of(text: str) -> list[list[str]]:
    return [[cell.strip(" |") for cell in line.split(" | ")] for line in text.splitlines() if line[:2] == "| "]


def test_tuning_report() -> None:
    settings = [Setting(budget, theta, 4) for budget in (2.0, 0.5) for theta in (0.2, 0.01)]
    scores = [scored(PLAIN, 0.1), *(scored(one, 0.9, 1.5 - number / 10) for number, one in enumerate(settings))]
    best = choose(scores[1:])
    report = {**HEAD, **summarize_tuning(scores, best, [scored(PLAIN, 0.2), scored(best.setting, 0.8, 1.9)])}
    assert json.loads(json.dumps(report)) == report
    assert report["best"]["setting"] == {"budget": 0.5, "min_retention": 0.01, "unfiltered_end": 4}
    text, _, held_out, _, tried = tuning_markdown(report)
    assert text.startswith("Best: budget 0.5, theta 0.01, unfiltered end 4. ")
    assert rows_of(held_out)[2:] == [
        ["plain", "2", "0.20 (0.10 to 0.30)", "2.000 (1.900 to 2.100)", "+0.000 (-0.100 to +0.100)"],
        [best.setting.label(), "2", "0.80 (0.70 to 0.90)", "1.900 (1.800 to 2.000)", "-0.100 (-0.200 to +0.000)"],
    ]
    assert [row[:3] for row in rows_of(tried)[2:]] == [
        ["plain", "2", "0.10 (0.00 to 0.20)"],
        ["budget 0.5, theta 0.01, unfiltered end 4", "2", "0.90 (0.80 to 1.00)"],
        ["budget 0.5, theta 0.2, unfiltered end 4", "2", "0.90 (0.80 to 1.00)"],
        ["budget 2, theta 0.01, unfiltered end 4", "2", "0.90 (0.80 to 1.00)"],
        ["budget 2, theta 0.2, unfiltered end 4", "2", "0.90 (0.80 to 1.00)"],
    ]
    assert set(draw_tuning(report, "m")) == {"tuning.png", "tuning.svg"}
