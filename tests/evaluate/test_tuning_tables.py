"""The grid of a search, and the tables that are made for it: none twice, each with its own settings."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_tables import small_table

import vllm_longmamba.evaluate.tuning_tables as tuning_tables
from vllm_longmamba.calibration.settings import CalibrationSettings
from vllm_longmamba.evaluate.methods import ModelSettings
from vllm_longmamba.evaluate.tuning_tables import CLAMP_PERCENTS, THETAS, Grid, TriedTable, make_tables
from vllm_longmamba.tables import ClosedLoop, ThresholdTable

PAPER, CLOSED = CalibrationSettings(method="paper"), CalibrationSettings(method="closed-loop", measure_to=16)
Calibrated = list[CalibrationSettings]


@pytest.fixture
def calibrated(monkeypatch: pytest.MonkeyPatch) -> Calibrated:
    """The settings of all calibrations; each makes a `small_table` (retentions 1e-6, 1e-3 and 1) of these settings."""
    done: Calibrated = []

    def made(settings: CalibrationSettings) -> ThresholdTable:
        done.append(settings)
        metadata: dict[str, Any] = {"method": settings.method}
        if settings.method == "closed-loop":
            metadata["min_retention"] = settings.min_retention
            metadata["closed_loop"] = ClosedLoop(
                combine=settings.combine, lengths=(settings.measure_to,), text_tokens=9, budget=settings.budget
            )
        else:
            metadata |= {"clamp_percent": settings.clamp("Mamba2ForCausalLM")}
            metadata |= {"combine": settings.way_to_combine, "min_retention": settings.theta, "budget": settings.budget}
        return small_table(**metadata)

    def calibrate_all(model: str, settings: list[CalibrationSettings], **engine_args: Any) -> list[ThresholdTable]:
        assert (model, engine_args) == ("org/model", {"dtype": "float32", "additional_config": {"other": 1}})
        return [made(each) for each in settings]

    monkeypatch.setattr(tuning_tables, "calibrate_all", calibrate_all)
    return done


def tables_of(grid: Grid, settings: CalibrationSettings, folder: Path) -> list[TriedTable]:
    def progress(description: str, total: int) -> Callable[[], None]:
        return lambda: None

    started = []

    @contextmanager
    def starting() -> Iterator[None]:
        started.append(True)
        yield

    # `calibrate` decides itself on the length and on what else it needs.
    arguments = {"model": "org/model", "model_impl": "longmamba", "dtype": "float32", "max_model_len": 9}
    arguments["additional_config"] = {"other": 1, "longmamba": {"filter": False}}
    model = ModelSettings(arguments, arguments, starting=starting)
    before = len(list(folder.glob("*")))
    tables = make_tables(model, grid, settings, [], {"weights": "w"}, folder, progress)
    new = len(list(folder.glob("*"))) - before
    # One engine for all; in the closed loop one for each. A failed start of any is said in one line.
    assert len(started) == (new if grid.method == "closed-loop" else min(new, 1))
    return tables


def test_tables_of_the_paper(calibrated: Calibrated, tmp_path: Path) -> None:
    grid = Grid("paper", thetas=[1e-4, 1e-2], clamp_percents=[5.0, 20.0, 0.0])
    tables = tables_of(grid, PAPER, tmp_path / "out")
    # Without a clamp the table is what `longmamba calibrate` makes by default.
    assert calibrated == [*(replace(PAPER, clamp_percent=clamp) for clamp in (5.0, 20.0)), CalibrationSettings()]
    of_tables = [one.table.metadata for one in tables]
    assert [(of.method, of.clamp_percent, of.combine) for of in of_tables] == [
        ("paper", 5.0, "mean"),
        ("paper", 20.0, "mean"),
        ("unclamped", 0.0, "clipped"),
    ]
    assert [list(one.thetas) for one in tables] == [[1e-4, 1e-2]] * 3
    again = tables_of(grid, PAPER, tmp_path / "out")
    assert [one.path for one in again] == [one.path for one in tables]
    assert len(calibrated) == 3


def test_tables_of_budgets_without_a_clamp(calibrated: Calibrated, tmp_path: Path) -> None:
    grid = Grid("paper", thetas=[0.1], clamp_percents=[0.0, 5.0], budgets=[1.0, 2.0], unfiltered_ends=[0, 4])
    tables = tables_of(grid, PAPER, tmp_path)
    # The ends take no calibration.
    assert calibrated == [CalibrationSettings(), CalibrationSettings(budget=2.0), replace(PAPER, clamp_percent=5.0)]
    assert [one.path.name.rpartition("-")[0] for one in tables] == ["table-C0", "table-C0-budget2", "table-C5"]


def test_tables_of_the_closed_loop(calibrated: Calibrated, tmp_path: Path) -> None:
    grid = Grid("closed-loop", thetas=[0.01, 0.5], budgets=[0.5, 1.0])
    tables = tables_of(grid, CLOSED, tmp_path)
    expected = [(budget, theta) for budget in (0.5, 1.0) for theta in (0.01, 0.5)]
    assert calibrated == [replace(CLOSED, budget=budget, min_retention=theta) for budget, theta in expected]
    assert [list(one.thetas) for one in tables] == [[theta] for _, theta in expected]
    names = [one.path.name.rpartition("-")[0] for one in tables]
    assert names == [f"table-budget{budget:g}-theta{theta:g}" for budget, theta in expected]
    # What an interrupted run has not made yet is made; nothing is made twice.
    tables[1].path.unlink()
    assert [one.path for one in tables_of(grid, CLOSED, tmp_path)] == [one.path for one in tables]
    assert calibrated[4:] == [calibrated[1]]
    # Other lengths are another table.
    tables_of(grid, replace(CLOSED, measure_to=12), tmp_path)
    assert len(calibrated) == 9


def test_defaults_of_a_grid() -> None:
    paper, closed = Grid("paper"), Grid("closed-loop")
    assert (paper.thetas, paper.clamp_percents, paper.budgets) == (THETAS["paper"], CLAMP_PERCENTS, (1.0,))
    assert (closed.thetas, closed.clamp_percents, closed.budgets) == ((0.01, 0.05, 0.2, 0.5, 0.7), (), (1.0,))
    assert (paper.further, closed.further, paper.unfiltered_ends) == (2, 0, (0,))


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
        ("closed-loop", {"further": 1}, "--further: with the method closed-loop every theta takes a calibration"),
    ],
)
def test_a_grid_refuses(method: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Grid(method, **given)
