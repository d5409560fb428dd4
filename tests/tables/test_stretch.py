"""The stretched sums, in float64, against numpy with all S points laid out."""

import numpy as np
import pytest
import torch

from vllm_longmamba.tables.stretch import crossing_values


def _crossing_value(curve: np.ndarray, prompt_length: int, budget: float = 1.0) -> float:
    tokens = len(curve)
    points = np.interp(np.arange(prompt_length) * (tokens - 1) / (prompt_length - 1), np.arange(tokens), curve)
    exceeds = np.cumsum(points) > budget * curve.sum()
    return float(points[np.argmax(exceeds)]) if exceeds.any() else 0.0


@pytest.mark.parametrize(
    ("tokens", "lengths"),
    [
        pytest.param(2, (3, 4, 5, 1000), id="two tokens"),
        pytest.param(5, (6, 7, 8, 9, 10, 11, 999), id="five tokens"),
        pytest.param(100, (101, 199, 200, 201, 7777), id="hundred"),
        pytest.param(513, (514, 1025, 10_000, 30_000), id="no power of two"),
        pytest.param(2048, (3000, 10_000, 192_000), id="mamba-1.4b"),
    ],
)
@pytest.mark.parametrize("clamp_percent", [0, 1, 20])
def test_crossing_values(tokens: int, lengths: tuple[int, ...], clamp_percent: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    dt = torch.exp(torch.randn(6, tokens, generator=generator).double() * torch.linspace(0.01, 3, 6).unsqueeze(1) - 4)
    dt[2] = 0.0
    dt[3] = torch.linspace(1, 0, tokens)
    curve = torch.minimum(dt, torch.quantile(dt, 1 - clamp_percent / 100, dim=1, keepdim=True))
    curve = curve.sort(dim=1, descending=True).values
    expected = [[_crossing_value(row, length) for length in lengths] for row in curve.numpy()]
    values = crossing_values(curve, lengths)
    np.testing.assert_allclose(values.numpy(), expected, rtol=1e-9)
    assert (values[2] == 0.0).all()


@pytest.mark.parametrize("budget", [0.125, 1, 4])
@pytest.mark.parametrize(
    ("tokens", "lengths"),
    [
        pytest.param(2, (3, 5, 9, 33), id="two tokens"),
        pytest.param(100, (101, 399, 401, 7777), id="hundred"),
        pytest.param(513, (514, 1900, 2200, 30_000), id="no power of two"),
    ],
)
def test_crossing_values_of_a_budget(budget: float, tokens: int, lengths: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(tokens)
    dt = torch.exp(torch.randn(5, tokens, generator=generator).double() * torch.linspace(0.01, 3, 5).unsqueeze(1) - 4)
    dt[2] = 0.0
    curve = dt.sort(dim=1, descending=True).values
    expected = np.array([[_crossing_value(row, length, budget) for length in lengths] for row in curve.numpy()])
    np.testing.assert_allclose(crossing_values(curve, lengths, budget).numpy(), expected, rtol=1e-9)
    # A level curve never exceeds the budget where the prompt is shorter than as many training lengths.
    stays_below = [budget * tokens > length for length in lengths]
    assert (expected[0] == 0.0).tolist() == stays_below
    assert any(stays_below) is (budget == 4)


def test_crossing_values_without_rows() -> None:
    assert crossing_values(torch.ones(3, 4, dtype=torch.float64), ()).shape == (3, 0)
