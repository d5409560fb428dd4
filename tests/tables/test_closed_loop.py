"""Tests of tables/closed_loop.py."""

import math

import numpy as np
import pytest
import torch

from vllm_longmamba.tables.closed_loop import (
    budget_thresholds,
    combine_thresholds,
    interpolate_thresholds,
    measured_lengths,
)


def looped_threshold(dt: list[float], budget: float) -> float:
    """The definition: add up the dt's from the largest on; the threshold is the one that passes the budget."""
    total = 0.0
    for value in sorted(dt, reverse=True):
        total += value
        if total > budget:
            return value
    return -1.0


@pytest.mark.parametrize(("tokens", "channels"), [(1, 1), (2, 3), (37, 5), (1000, 7)])
def test_budget_thresholds(tokens: int, channels: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    dt = torch.randn(tokens, channels, generator=generator).mul(3).exp()
    dt[torch.rand(dt.shape, generator=generator) < 0.1] = 0.0
    # Equal values, which a threshold keeps or filters together.
    dt[: tokens // 3] = dt[tokens - tokens // 3 :].flip(0)
    for share in (0.0, 0.01, 0.3, 0.9, 0.9999, 1.0, 2.0):
        budget = share * dt.sum(0, dtype=torch.float64)
        found = budget_thresholds(dt, budget)
        expected = [looped_threshold(dt[:, channel].tolist(), float(budget[channel])) for channel in range(channels)]
        assert found.tolist() == expected
        kept = torch.where(dt > found, dt, 0.0).sum(0, dtype=torch.float64)
        assert bool((kept <= budget).all())


def test_budget_thresholds_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    dt = torch.rand(50, 11, generator=torch.Generator().manual_seed(1))
    budget = torch.linspace(0, 30, 11, dtype=torch.float64)
    whole = budget_thresholds(dt, budget)
    monkeypatch.setattr("vllm_longmamba.tables.closed_loop.CHUNK_ELEMENTS", 150)
    assert torch.equal(budget_thresholds(dt, budget), whole)
    # A slice of a wider tensor, as a mixer has it.
    assert torch.equal(budget_thresholds(torch.cat([dt, dt], dim=1)[:, 11:], budget), whole)
    assert budget_thresholds(dt[:, :0], budget[:0]).shape == (0,)


def test_budget_thresholds_refuses() -> None:
    dt, budget = torch.rand(5, 2), torch.ones(2, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"dt must be \(tokens, channels\) float32, got \(5, 2\) torch.float64"):
        budget_thresholds(dt.double(), budget)
    with pytest.raises(ValueError, match=r"got \(0, 2\)"):
        budget_thresholds(dt[:0], budget)
    with pytest.raises(ValueError, match=r"budget must be \(2,\) float64, got \(2,\) torch.float32"):
        budget_thresholds(dt, budget.float())
    for wrong in (-1.0, math.nan, math.inf):
        dt[3, 1] = wrong
        with pytest.raises(ValueError, match="dt must be finite and >= 0"):
            budget_thresholds(dt, budget)


def test_combine_thresholds() -> None:
    values = torch.tensor([[1.0, -1.0, -1.0, 4.0], [2.0, -1.0, 3.0, 1.0], [9.0, -1.0, 6.0, 2.0]])
    assert combine_thresholds(values, "median").tolist() == [2.0, -1.0, 3.0, 2.0]
    assert combine_thresholds(values, "min").tolist() == [1.0, -1.0, -1.0, 1.0]
    assert combine_thresholds(values[:2], "median").tolist() == [1.5, -1.0, 1.5, 2.5]
    assert combine_thresholds(values, "mean").tolist() == pytest.approx([4.0, -1.0, 3.0, 7 / 3])
    # Twice the median is 4, 0, 6 and 4.
    assert combine_thresholds(values, "clipped").tolist() == pytest.approx([7 / 3, -1.0, 3.0, 7 / 3])
    assert combine_thresholds(torch.tensor([[1.0], [3.0], [99.0], [2.0]]), "clipped").tolist() == [2.75]
    assert combine_thresholds(values[:1], "median").tolist() == values[0].tolist()
    with pytest.raises(ValueError, match="combine must be one of median, min, mean, clipped, got 'max'"):
        combine_thresholds(values, "max")
    with pytest.raises(ValueError, match=r"at least one sequence, got \(0, 4\)"):
        combine_thresholds(values[:0], "min")


@pytest.mark.parametrize(
    ("rows", "longest", "expected"),
    [
        ([96, 144, 192], None, [144, 192]),
        ([96, 144], None, [144]),
        ([96, 144, 1200], None, [144, 288, 576, 1152, 1200]),
        ([96, 144, 1152], None, [144, 288, 576, 1152]),
        ([96, 144, 1200], 600, [144, 288, 576, 600]),
        ([96, 144, 1200], 9999, [144, 288, 576, 1152, 1200]),
        ([96, 144, 1200], 144, [144]),
    ],
)
def test_measured_lengths(rows: list[int], longest: int | None, expected: list[int]) -> None:
    assert measured_lengths(rows, longest) == expected


def test_measured_lengths_refuses() -> None:
    with pytest.raises(ValueError, match="must reach the first row that filters, 144 tokens, got 143"):
        measured_lengths([96, 144, 192], 143)


def test_interpolate_thresholds() -> None:
    """Powers of S are straight lines in ln-ln, and come out as they are at every row, those beyond the last too."""
    rows = [96, 144, 200, 288, 300, 576, 5000]
    lengths = [144, 288, 576]
    measured = torch.tensor([[2.0 * length**0.5, 5.0, -1.0, 3.0, -1.0] for length in lengths])
    measured[1:, 2] = torch.tensor([10.0, 20.0])
    measured[:, 3] = torch.tensor([3.0, 4.0, 2.0])
    found = interpolate_thresholds(lengths, measured, np.array(rows))
    assert found.dtype == torch.float32
    assert found[0].tolist() == [-1.0] * 5
    assert found[1:, 0].tolist() == pytest.approx([2 * length**0.5 for length in rows[1:]])
    assert found[1:, 1].tolist() == pytest.approx([5.0] * 6)
    # From no threshold at 144 to 10 at 288: a straight line in ln S.
    assert found[1:4, 2].tolist() == pytest.approx([-1.0, 10 * math.log(200 / 144) / math.log(2), 10.0])
    assert float(found[-1, 2]) == pytest.approx(20 * (5000 / 576))
    # It fell between the last two: beyond, it stays.
    assert float(found[-1, 3]) == pytest.approx(2.0)
    assert found[:, 4].tolist() == [-1.0] * 7


def test_interpolate_thresholds_from_one_length() -> None:
    found = interpolate_thresholds([144], torch.tensor([[0.5, -1.0]]), [96, 144, 192, 5000])
    assert found.tolist() == [[-1.0, -1.0], [0.5, -1.0], [0.5, -1.0], [0.5, -1.0]]


@pytest.mark.parametrize("lengths", [[144, 144], [288, 144], [200, 288], [144, 288, 576]])
def test_interpolate_thresholds_refuses(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="lengths must ascend, one for each of 2 thresholds, from the first row"):
        interpolate_thresholds(lengths, torch.ones(2, 3), [96, 144, 192])
