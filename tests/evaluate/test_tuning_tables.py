"""The grid of a search, and the tables that are made for it: none twice, each with its own settings."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_tables import small_table

import vllm_longmamba.evaluate.tuning_tables as tuning_tables
from vllm_longmamba.calibration.settings import CalibrationSettings
from vllm_longmamba.evaluate.tuning import candidate
from vllm_longmamba.evaluate.tuning_settings import BUDGETS, CLAMP_PERCENTS, THETAS, Grid, TuningSettings, make_grid
from vllm_longmamba.evaluate.tuning_tables import TableMaker
from vllm_longmamba.tables import ClosedLoop, ThresholdTable, load_table

PAPER, CLOSED = CalibrationSettings(method="paper"), CalibrationSettings(method="closed-loop")
Calibrated = list[CalibrationSettings]


def settings_of(grid: Grid, calibration: CalibrationSettings, lengths: list[int] | None = None) -> TuningSettings:
    return TuningSettings(
        grid=grid,
        held_out=[],
        calibration_texts=[],
        calibration=calibration,
        passkeys=True,
        perplexity=True,
        lengths=lengths,
        depths=1,
        seeds=[0],
        windows=1,
        scored_tokens=100,
    )


@pytest.fixture
def calibrated(monkeypatch: pytest.MonkeyPatch) -> Calibrated:
    """The settings of all calibrations; each makes a `small_table` (retentions 1e-6, 1e-3 and 1) of these settings."""
    done: Calibrated = []

    def calibrate(model: str, settings: CalibrationSettings, **engine_args: Any) -> ThresholdTable:
        assert engine_args == {"dtype": "float32"}
        done.append(settings)
        metadata: dict[str, Any] = {"method": settings.method}
        if settings.method == "closed-loop":
            lengths = (settings.measure_to,)
            metadata["min_retention"] = settings.min_retention
            metadata["closed_loop"] = ClosedLoop(
                combine=settings.combine, lengths=lengths, text_tokens=9, budget=settings.budget
            )
        else:
            metadata |= {"clamp_percent": settings.clamp("Mamba2ForCausalLM")}
            metadata |= {"combine": settings.way_to_combine, "min_retention": settings.theta, "budget": settings.budget}
        return small_table(**metadata)

    monkeypatch.setattr(tuning_tables, "calibrate", calibrate)
    return done


def maker(settings: TuningSettings, folder: Path) -> TableMaker:
    def progress(description: str, total: int) -> Callable[[], None]:
        return lambda: None

    # `calibrate` decides on the length itself.
    engine_args = {"dtype": "float32", "max_model_len": 9}
    return TableMaker("org/model", settings, engine_args, {"weights": "w"}, folder, progress)


def test_make_paper(calibrated: Calibrated, tmp_path: Path) -> None:
    settings = settings_of(make_grid("paper", thetas=[1e-4, 1e-2], clamp_percents=[5.0, 20.0, 0.0]), PAPER)
    tables = maker(settings, tmp_path / "out").make(16)
    # Without a clamp the table is what `longmamba calibrate` makes by default.
    assert calibrated == [*(replace(PAPER, clamp_percent=clamp) for clamp in (5.0, 20.0)), CalibrationSettings()]
    of_tables = [one.table.metadata for one in tables]
    assert [(of.method, of.clamp_percent, of.combine) for of in of_tables] == [
        ("paper", 5.0, "mean"),
        ("paper", 20.0, "mean"),
        ("unclamped", 0.0, "clipped"),
    ]
    assert [list(one.thetas) for one in tables] == [[1e-4, 1e-2]] * 3
    again = maker(settings, tmp_path / "out").make(16)
    assert [one.path for one in again] == [one.path for one in tables]
    assert len(calibrated) == 3


def test_make_budgets_without_a_clamp(calibrated: Calibrated, tmp_path: Path) -> None:
    grid = make_grid("paper", thetas=[0.1], clamp_percents=[0.0, 5.0], budgets=[1.0, 2.0])
    tables = maker(settings_of(grid, PAPER), tmp_path).make(16)
    assert calibrated == [CalibrationSettings(), CalibrationSettings(budget=2.0), replace(PAPER, clamp_percent=5.0)]
    assert [one.path.name.rpartition("-")[0] for one in tables] == ["table-C0", "table-C0-budget2", "table-C5"]
    labels = ["C 0, theta 0.1", "C 0, budget 2, theta 0.1", "C 5, theta 0.1"]
    assert [candidate(one, 0.1).label() for one in tables] == labels


@pytest.mark.parametrize("method", ["paper", "closed-loop"])
def test_make_unfiltered_ends(calibrated: Calibrated, tmp_path: Path, method: str) -> None:
    """Each with every table, and no calibration more."""
    of_paper: dict[str, Any] = {"clamp_percents": [0.0]} if method == "paper" else {}
    grid = make_grid(method, thetas=[0.1], budgets=[0.25, 1.0], unfiltered_ends=[0, 4], **of_paper)
    tables = maker(settings_of(grid, CalibrationSettings(method=method)), tmp_path).make(16)
    assert [of.budget for of in calibrated] == [0.25, 1.0]
    settings = [candidate(one, 0.1) for one in tables]
    assert [(one.budget, one.unfiltered_end) for one in settings] == [(0.25, 0), (0.25, 4), (1.0, 0), (1.0, 4)]
    assert [one.label().split(", ")[-2] for one in settings[1::2]] == ["unfiltered end 4"] * 2
    # All made by `small_table`: the same thresholds with every budget, but not with every end.
    assert (len({one.thresholds for one in settings}), len({one.path for one in tables})) == (2, 4)
    # The file says what the engine shall do with it.
    assert [load_table(one.path).unfiltered_end() for one in tables] == [0, 4, 0, 4]
    assert [load_table(one.path).layers.keys() for one in tables] == [one.table.layers.keys() for one in tables]


def test_make_closed_loop(calibrated: Calibrated, tmp_path: Path) -> None:
    # The same channels are global with 0.01 and 0.5, and others with 1e-4.
    settings = settings_of(make_grid("closed-loop", thetas=[0.01, 1e-4, 0.5], budgets=[0.5, 1.0]), CLOSED)
    tables = maker(settings, tmp_path).make(16)
    expected = [(budget, theta) for budget in (0.5, 1.0) for theta in (0.01, 1e-4)]
    assert calibrated == [
        replace(CLOSED, budget=budget, min_retention=theta, measure_to=16) for budget, theta in expected
    ]
    assert [list(one.thetas) for one in tables] == [[0.01, 0.5], [1e-4]] * 2
    assert candidate(tables[0], 0.01).thresholds == candidate(tables[0], 0.5).thresholds
    names = [one.path.name.rpartition("-")[0] for one in tables]
    assert names == [f"table-budget{budget:g}-theta{theta:g}" for budget, theta in expected]
    # What an interrupted run has not made yet is made; nothing is made twice.
    tables[1].path.unlink()
    assert [one.path for one in maker(settings, tmp_path).make(16)] == [one.path for one in tables]
    assert calibrated[4:] == [calibrated[1]]


def test_measure_to(calibrated: Calibrated, tmp_path: Path) -> None:
    grid = make_grid("closed-loop", thetas=[0.01])
    for given in (None, 12):
        maker(settings_of(grid, replace(CLOSED, measure_to=given)), tmp_path).make(16)
    # Other lengths are another table.
    assert [one.measure_to for one in calibrated] == [16, 12]


def test_make_grid() -> None:
    assert make_grid("paper") == Grid(THETAS["paper"], CLAMP_PERCENTS, BUDGETS, 1)
    assert make_grid("closed-loop") == Grid((0.01, 0.05, 0.2, 0.5, 0.7), (), BUDGETS, 0)
    assert make_grid("closed-loop", [0.1], None, [0.5], 0) == Grid([0.1], (), [0.5], 0)


def test_lengths_for() -> None:
    assert settings_of(make_grid("paper"), PAPER).lengths_for(512) == [4096, 8192]
    assert settings_of(make_grid("closed-loop"), CLOSED).lengths_for(512) == [4096, 8192]
    assert settings_of(make_grid("closed-loop"), CLOSED, [1000]).lengths_for(512) == [1000]


@pytest.mark.parametrize(
    ("method", "given", "message"),
    [
        ("paper", {"thetas": [0.0, 0.1]}, "--thetas must be different numbers between 0 and 1, got 0.0, 0.1"),
        ("paper", {"thetas": [0.1, 1.0]}, "--thetas must be"),
        ("paper", {"thetas": [0.1, 0.1]}, "--thetas must be different"),
        ("paper", {"clamp_percents": [0.0, 100.0]}, "--clamp-percents must be different numbers between 0 and 100"),
        ("paper", {"budgets": [2.0], "clamp_percents": [5.0]}, "--budgets: a clamp allows for no budget but 1"),
        ("paper", {"budgets": [2.0, 2.0]}, "--budgets must be different numbers above 0, got 2.0, 2.0"),
        ("unclamped", {}, "--method must be paper or closed-loop, got 'unclamped'; paper tries tables without a clamp"),
        ("closed-loop", {"budgets": [0.0, 1.0]}, "--budgets must be different numbers above 0, got 0.0, 1.0"),
        ("paper", {"unfiltered_ends": [0, 0]}, "--unfiltered-ends must be different numbers of tokens, 0 or more"),
        ("paper", {"unfiltered_ends": [-1]}, "--unfiltered-ends must be .* tokens, 0 or more, got -1"),
        ("paper", {"unfiltered_ends": [1 << 31]}, "--unfiltered-ends: unfiltered_end must be a number of tokens, 0 to"),
        ("closed-loop", {"clamp_percents": [5.0]}, "--clamp-percents: C has no part in the method closed-loop"),
        ("closed-loop", {"refine": 1}, "--refine: with the method closed-loop every theta takes a calibration"),
    ],
)
def test_make_grid_refuses(method: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_grid(method, **given)


def test_settings_refuse() -> None:
    with pytest.raises(ValueError, match="--measure-to has a part in the method closed-loop only"):
        settings_of(make_grid("paper"), replace(PAPER, measure_to=16))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"needles": 4, "passkeys": False}, "--needles asks for more than the pass key"),
        ({"search_unfiltered": True, "perplexity": False}, "--search-unfiltered goes by the loss of text"),
    ],
)
def test_what_a_score_does_not_go_with(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(settings_of(make_grid("paper"), PAPER), **changes)
