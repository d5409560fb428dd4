"""The budget of the method "unclamped": thresholds, metadata, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vllm_longmamba.tables import LayerCalibration, TableMetadata, ThresholdTable, load_table, save_table

MakeMetadata = Callable[..., TableMetadata]

LENGTH, CHANNELS = 300, 4
A = torch.full((CHANNELS,), -1e-3)


def calibrated(rows: list[int], budget: float, dts: list[torch.Tensor], method: str = "paper") -> torch.Tensor:
    calibration = LayerCalibration(A, LENGTH, rows, 0.0, method, budget)
    for dt in dts:
        calibration.add(dt)
    return calibration.result().dt_threshold


def lognormal(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.exp(torch.randn(LENGTH, CHANNELS, generator=generator) * torch.linspace(0.2, 2, CHANNELS) - 4)


def threshold_by_text(dt: np.ndarray, prompt_length: int, budget: float) -> float:
    """All S points of one channel's stretched curve laid out and added up one by one."""
    curve = np.sort(dt.astype(np.float64))[::-1]
    running = 0.0
    for point in range(prompt_length):
        value = float(np.interp(point * (len(curve) - 1) / (prompt_length - 1), np.arange(len(curve)), curve))
        running += value
        if running > budget * curve.sum():
            return value
    return 0.0


@pytest.mark.parametrize("budget", [0.125, 1, 4])
def test_layer_calibration_of_a_budget(budget: float) -> None:
    rows = [LENGTH, 301, 700, 1250, 3001]
    dts = [lognormal(seed) for seed in range(3)]
    found = calibrated(rows, budget, dts)
    assert found[0].tolist() == [-1.0] * CHANNELS
    for row, length in enumerate(rows[1:], start=1):
        for channel in range(CHANNELS):
            each = [threshold_by_text(dt[:, channel].numpy(), length, budget) for dt in dts]
            # 0 would filter nothing but dt = 0.
            expected = np.mean(each) if any(each) else -1.0
            assert found[row, channel].item() == pytest.approx(expected, rel=1e-6)
    # At four times the training length's sum, twice the length filters nothing and ten times the length does.
    assert bool((found[2] < 0).all()) is (budget == 4)
    assert bool((found[4] > 0).all())


@pytest.mark.parametrize("method", ["paper", "unclamped"])
@pytest.mark.parametrize("factor", [2, 4])
def test_a_budget_is_a_row_of_another_length(factor: int, method: str) -> None:
    """Keeping n times as much of n times as many tokens is the same threshold."""
    generator = torch.Generator().manual_seed(factor)
    dts = [torch.rand(LENGTH, CHANNELS, generator=generator) + 0.1 for _ in range(3)]
    lengths = [4 * LENGTH, 9 * LENGTH]
    paper = calibrated([LENGTH, *lengths], 1, dts, method)
    more = calibrated([LENGTH, *(factor * length for length in lengths)], factor, dts, method)
    # Half of the largest dt does not grow with the length: some 1 in 4 * 300.
    np.testing.assert_allclose(more.numpy(), paper.numpy(), rtol=5e-3)
    assert bool((calibrated([LENGTH, *lengths], factor, dts, method)[1:] < 0.95 * paper[1:]).all())


def test_retention_knows_no_budget() -> None:
    """Which channels are global does not depend on it."""
    results = []
    for budget in (1.0, 0.25):
        calibration = LayerCalibration(A, LENGTH, [LENGTH, 900], 0.0, budget=budget)
        calibration.add(lognormal(0))
        results.append(calibration.result().retention)
    assert torch.equal(*results)


@pytest.mark.parametrize("budget", [0, -1, float("nan"), float("inf"), "1", True], ids=repr)
def test_wrong_budgets_are_refused(budget: Any, make_metadata: MakeMetadata) -> None:
    with pytest.raises(ValueError, match="LayerCalibration: budget must be a factor above 0, got "):
        LayerCalibration(A, LENGTH, [LENGTH, 900], 0.0, budget=budget)
    with pytest.raises(ValueError, match="TableMetadata: budget must be a factor above 0, got "):
        make_metadata(method="unclamped", clamp_percent=0, budget=budget)


def test_the_budget_is_saved(make_table: Callable[..., ThresholdTable], tmp_path: Path) -> None:
    table = make_table(method="unclamped", clamp_percent=0, budget=2)
    assert isinstance(table.metadata.budget, float), "2 and 2.0 must write the same bytes"
    save_table(table, tmp_path / "table")
    assert load_table(tmp_path / "table").metadata == table.metadata


def test_the_paper_has_no_budget(make_metadata: MakeMetadata) -> None:
    message = "TableMetadata.budget must be 1.* with the method 'paper'.*; only 'unclamped' has others"
    with pytest.raises(ValueError, match=message):
        make_metadata(budget=0.5)
    assert make_metadata(budget=1).budget == 1.0


def test_the_method_without_a_clamp_has_none(make_metadata: MakeMetadata) -> None:
    message = "with the method 'unclamped' clamp_percent must be 0, got 5.0; with a clamp the method is 'paper'"
    with pytest.raises(ValueError, match=message):
        make_metadata(method="unclamped")
