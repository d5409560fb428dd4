"""Calibration against the method written out in plain loops, point by point."""

import math

import numpy as np
import pytest
import torch

from vllm_longmamba.tables import (
    LayerCalibration,
    LayerThresholds,
    calibrate,
    default_row_lengths,
    merge_channel_shards,
)

# Thresholds are float32: half a unit in the last place is 6e-8.
TOLERANCE = 1e-7


def _dt(length: int, channels: int, seed: int) -> torch.Tensor:
    """Lognormal dt's of a different spread in each channel; ties where a channel is quantised."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.linspace(0.05, 3.0, channels)
    dt = torch.exp(torch.randn(length, channels, generator=generator) * spread - 4)
    dt[:, -1] = torch.ceil(dt[:, -1] * 20) / 20
    return dt.float()


def _threshold_by_text(dt: list[float], prompt_length: int, clamp_percent: float) -> float:
    """DESIGN.md, section 1, g(S) of one channel and one sequence, all S points laid out."""
    tokens = len(dt)
    ascending = sorted(dt)
    position = (100 - clamp_percent) / 100 * (tokens - 1)
    low = math.floor(position)
    high = min(low + 1, tokens - 1)
    clamp = ascending[low] + (position - low) * (ascending[high] - ascending[low])
    curve = sorted((min(value, clamp) for value in dt), reverse=True)
    target = math.fsum(curve)
    running = 0.0
    for point in range(prompt_length):
        place = point * (tokens - 1) / (prompt_length - 1)
        left = min(int(place), tokens - 2)
        value = curve[left] + (place - left) * (curve[left + 1] - curve[left])
        running += value
        if running > target:
            return value
    raise AssertionError("the running sum never exceeded the target")


def _retention_by_text(A: np.ndarray, dt: np.ndarray, channel: int) -> float:
    total = math.fsum(float(value) for value in dt[:, channel])
    states = np.atleast_1d(A[channel])
    return math.fsum(math.exp(float(state) * total) for state in states) / len(states)


@pytest.mark.parametrize(
    ("length", "row_lengths", "clamp_percent", "d_state"),
    [
        pytest.param(48, [48, 49, 50, 95, 96, 97, 480, 1999], 5.0, None, id="mamba2"),
        pytest.param(61, [61, 75, 122, 610, 2300], 20.0, 3, id="mamba1, no power of two"),
        pytest.param(64, [64, 128, 1000], 0.0, 1, id="no clamp"),
        pytest.param(2, [2, 3, 4, 50], 5.0, None, id="shortest training length"),
        pytest.param(3, [3, 4, 7, 31], 50.0, 2, id="three tokens"),
        pytest.param(33, [33], 5.0, None, id="row 0 alone"),
    ],
)
def test_layer_calibration(length: int, row_lengths: list[int], clamp_percent: float, d_state: int | None) -> None:
    channels = 7
    generator = torch.Generator().manual_seed(1)
    A = -torch.exp(torch.randn((channels,) if d_state is None else (channels, d_state), generator=generator))
    sequences = [_dt(length, channels, seed) for seed in (10, 11, 12)]
    calibration = LayerCalibration(A, length, row_lengths, clamp_percent)
    for dt in sequences:
        calibration.add(dt)
    result = calibration.result()

    arrays = [dt.double().numpy() for dt in sequences]
    retention = [
        math.fsum(_retention_by_text(A.double().numpy(), dt, channel) for dt in arrays) / 3
        for channel in range(channels)
    ]
    np.testing.assert_allclose(result.retention.numpy(), retention, rtol=1e-12)
    # Between two channels, so that rounding decides nothing.
    min_retention = sum(sorted(retention)[3:5]) / 2
    assert (result.retention > min_retention).tolist() == [value > min_retention for value in retention]

    assert result.dt_threshold.shape == (len(row_lengths), channels)
    assert (result.dt_threshold[0] == -1.0).all()
    for row, prompt_length in enumerate(row_lengths[1:], start=1):
        expected = [
            math.fsum(_threshold_by_text(dt[:, channel].tolist(), prompt_length, clamp_percent) for dt in arrays) / 3
            for channel in range(channels)
        ]
        np.testing.assert_allclose(result.dt_threshold[row].numpy(), expected, rtol=TOLERANCE)


def test_layer_calibration_keeps_the_expected_decay() -> None:
    """What the filter is for: over S tokens of the calibration's distribution, the kept dt's sum to that over L."""
    length, times = 500, 6
    generator = torch.Generator().manual_seed(4)
    uniform = torch.rand(length, generator=generator)
    exponential = torch.empty(length).exponential_(generator=generator)
    dt = torch.stack([uniform, exponential], dim=1)
    calibration = LayerCalibration(torch.full((2,), -1.0), length, [length, times * length], 0.0)
    calibration.add(dt)
    threshold = calibration.result().dt_threshold[1]
    kept = torch.where(dt > threshold, dt, 0.0).sum(dim=0) * times
    # The largest dt stands at the curve's end and counts by half: times * max / 2, 4 % of the sum at most.
    torch.testing.assert_close(kept, dt.sum(dim=0), rtol=0.04, atol=0.0)


def test_layer_calibration_of_silent_channels() -> None:
    """A sequence of dt = 0 counts as threshold 0 in the mean; with nothing else there is no filter."""
    active = torch.full((16, 3), 0.5)
    active[:, 0] = 0.0
    half_silent = active.clone()
    half_silent[:, 1] = 0.0
    calibration = LayerCalibration(torch.full((3,), -1.0), 16, [16, 32], 5.0)
    calibration.add(active)
    calibration.add(half_silent)
    result = calibration.result()
    assert result.dt_threshold[1].tolist() == [-1.0, 0.25, 0.5]
    assert result.retention[0] == 1.0


def test_layer_calibration_of_many_channels() -> None:
    """More channels than fit one chunk give what each channel gives alone."""
    length, channels = 100, 400
    dt = _dt(length, channels, seed=9)
    row_lengths = default_row_lengths(length, 10000)
    calibration = LayerCalibration(torch.full((channels,), -1e-3), length, row_lengths, 5.0)
    calibration.add(dt)
    # A chunk holds about 160 channels of 200 rows.
    chosen = [0, 160, 170, 399]
    alone = LayerCalibration(torch.full((4,), -1e-3), length, row_lengths, 5.0)
    alone.add(dt[:, chosen].contiguous())
    np.testing.assert_allclose(
        calibration.result().dt_threshold[:, chosen].numpy(), alone.result().dt_threshold.numpy(), rtol=TOLERANCE
    )


def test_layer_calibration_sorts_the_channels_of_each_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long training sequence of many channels is sorted in parts, here of 3, 3 and 1 channels."""
    dt = _dt(100, 7, seed=8)
    results = []
    for elements in (calibrate._SORT_ELEMENTS, 3 * 100):
        monkeypatch.setattr(calibrate, "_SORT_ELEMENTS", elements)
        calibration = LayerCalibration(torch.full((7,), -1e-3), 100, [100, 200, 500], 5.0)
        calibration.add(dt)
        results.append(calibration.result().dt_threshold)
    assert torch.equal(*results)


def test_layer_calibration_restores_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's own functions do not do here: an engine in this process makes vLLM put a stub in their place."""
    threads = [3]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    LayerCalibration(-torch.ones(3), 8, [8, 16], 5.0).add(torch.ones(8, 3))
    assert threads[-1] == 3
    assert 1 in threads


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_layer_calibration_on_cuda() -> None:
    length, channels = 300, 2000
    dt = _dt(length, channels, seed=5)
    results = []
    for device in ("cpu", "cuda"):
        calibration = LayerCalibration(
            torch.full((channels, 2), -0.1, device=device), length, default_row_lengths(length, 20000), 5.0
        )
        calibration.add(dt.to(device))
        results.append(calibration.result())
    np.testing.assert_allclose(results[0].dt_threshold.numpy(), results[1].dt_threshold.numpy(), rtol=TOLERANCE)
    np.testing.assert_allclose(results[0].retention.numpy(), results[1].retention.numpy(), rtol=1e-12)


@pytest.mark.parametrize(
    ("A", "row_lengths", "clamp_percent", "message"),
    [
        pytest.param(torch.ones(3), [8, 16], 5.0, "A must be .* negative", id="positive A"),
        pytest.param(torch.full((3,), float("nan")), [8, 16], 5.0, "A must be .* negative", id="NaN"),
        pytest.param(-torch.ones(3, 2, 2), [8, 16], 5.0, "A must be", id="dimensions"),
        pytest.param(-torch.ones(3), [9, 16], 5.0, "must begin with train_length 8", id="rows"),
        pytest.param(-torch.ones(3), [8, 16], 100.0, "clamp_percent must lie in", id="clamp"),
    ],
)
def test_layer_calibration_refuses(A: torch.Tensor, row_lengths: list[int], clamp_percent: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LayerCalibration(A, 8, row_lengths, clamp_percent)


@pytest.mark.parametrize(
    ("dt", "message"),
    [
        pytest.param(torch.ones(7, 3), r"must be \(8, 3\) float32", id="shorter"),
        pytest.param(torch.ones(8, 4), r"must be \(8, 3\) float32", id="channels"),
        pytest.param(torch.ones(8, 3).double(), r"must be \(8, 3\) float32", id="dtype"),
        pytest.param(torch.full((8, 3), float("nan")), "finite and >= 0", id="NaN"),
        pytest.param(torch.full((8, 3), -0.1), "finite and >= 0", id="raw dt"),
    ],
)
def test_layer_calibration_add_refuses(dt: torch.Tensor, message: str) -> None:
    calibration = LayerCalibration(-torch.ones(3), 8, [8, 16], 5.0)
    with pytest.raises(ValueError, match=message):
        calibration.add(dt)
    with pytest.raises(ValueError, match="at least one sequence"):
        calibration.result()


def test_layer_calibration_clips_the_mean_without_a_clamp() -> None:
    """One sequence of five has a dt that outweighs all others: the paper's mean follows it, the clipped does not."""
    A, length, rows = -torch.ones(2), 40, [40, 60, 400]
    sequences = [_dt(length, 2, seed) for seed in range(5)]
    sequences[3][7] = 50.0
    alone = []
    for dt in sequences:
        calibration = LayerCalibration(A, length, rows, 0.0)
        calibration.add(dt)
        alone.append(calibration.result().dt_threshold[1:].numpy())
    median = np.median(alone, axis=0)
    expected = {"paper": np.mean(alone, axis=0), "unclamped": np.mean(np.minimum(alone, 2 * median), axis=0)}
    assert (expected["paper"] > 2 * median).all()
    assert (expected["unclamped"] < 2 * median).all()
    for method, thresholds in expected.items():
        calibration = LayerCalibration(A, length, rows, 0.0, method)
        for dt in sequences:
            calibration.add(dt)
        result = calibration.result()
        assert result.dt_threshold[0].tolist() == [-1.0, -1.0]
        np.testing.assert_allclose(result.dt_threshold[1:].numpy(), thresholds, rtol=2 * TOLERANCE)
        # Retention stays a mean.
        totals = torch.stack(sequences).double().sum(dim=1)
        torch.testing.assert_close(result.retention, torch.exp(-totals).mean(dim=0), rtol=1e-12, atol=0.0)
    with pytest.raises(ValueError, match="LayerCalibration: method must be one of unclamped, paper, got 'clipped'"):
        LayerCalibration(A, length, rows, 0.0, "clipped")


def test_merge_channel_shards() -> None:
    dt = _dt(20, 6, seed=2)
    A = -torch.rand(6) - 0.1
    parts = []
    for channels in (slice(0, 6), slice(0, 4), slice(4, 6)):
        calibration = LayerCalibration(A[channels], 20, [20, 40, 70], 5.0)
        calibration.add(dt[:, channels].contiguous())
        parts.append(calibration.result())
    merged = merge_channel_shards(parts[1:])
    assert torch.equal(merged.retention, parts[0].retention)
    np.testing.assert_allclose(merged.dt_threshold.numpy(), parts[0].dt_threshold.numpy(), rtol=TOLERANCE)


def test_merge_channel_shards_refuses() -> None:
    with pytest.raises(ValueError, match="got 0 shards"):
        merge_channel_shards([])
    retention = torch.ones(2, dtype=torch.float64)
    shards = [LayerThresholds(retention=retention, dt_threshold=torch.zeros(rows, 2)) for rows in (2, 3)]
    with pytest.raises(ValueError, match=r"with \[2, 3\] rows"):
        merge_channel_shards(shards)
