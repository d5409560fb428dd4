"""Calibration against a second implementation that was written from the text alone, on dt's given directly."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references import independent_calibration

from vllm_longmamba.tables import LayerCalibration

# The contract of the two implementations.
TOLERANCE = 1e-3


def _dt(rng: np.random.Generator, tokens: int, channels: int, spread: float) -> np.ndarray:
    """dt's as softplus gives them: positive, log-normal, in float32."""
    means = rng.normal(-2.0, 1.0, size=channels)
    return np.exp(rng.normal(means, spread, size=(tokens, channels))).astype(np.float32)


@pytest.mark.parametrize("method", ["paper", "unclamped"])
@pytest.mark.parametrize("d_state", [None, 5], ids=["mamba2", "mamba1"])
@given(
    seed=st.integers(0, 2**32 - 1),
    train_length=st.integers(20, 150),
    sequences=st.integers(1, 5),
    clamp_percent=st.sampled_from([0.0, 1.0, 5.0, 12.5, 20.0, 33.3]),
    spread=st.floats(0.05, 1.5),
    min_retention=st.sampled_from([1e-20, 1e-5, 1e-2, 0.5]),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_same_table(
    d_state: int | None,
    method: str,
    seed: int,
    train_length: int,
    sequences: int,
    clamp_percent: float,
    spread: float,
    min_retention: float,
) -> None:
    rng = np.random.default_rng(seed)
    channels = 7
    dts = [_dt(rng, train_length, channels, spread) for _ in range(sequences)]
    A = -np.exp(rng.uniform(-5, 2, size=channels if d_state is None else (channels, d_state)))
    lengths = [train_length, *(round(train_length * factor) for factor in (1.1, 1.5, 2, 3.7, 8))]

    calibration = LayerCalibration(torch.from_numpy(A), train_length, lengths, clamp_percent, method)
    for dt in dts:
        calibration.add(torch.from_numpy(dt))
    ours = calibration.result()

    retention = independent_calibration.retention(A, dts)
    np.testing.assert_allclose(ours.retention.numpy(), retention, rtol=TOLERANCE, atol=1e-300)
    # A channel on the boundary may fall on either side; none of these lies there.
    assert (abs(retention / min_retention - 1) > 1e-6).all()
    np.testing.assert_array_equal(ours.retention.numpy() > min_retention, retention > min_retention)
    assert (ours.dt_threshold[0] == -1).all()
    for row, length in enumerate(lengths[1:], start=1):
        expected = independent_calibration.dt_threshold(dts, length, clamp_percent, method == "unclamped")
        np.testing.assert_allclose(ours.dt_threshold[row].numpy(), expected, rtol=TOLERANCE)
