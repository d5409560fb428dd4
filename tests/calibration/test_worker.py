"""Tests of vllm_longmamba/calibration/worker.py: what every worker records, and how their parts are joined."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from calibration_settings import PAPER_SETTINGS

from vllm_longmamba.calibration.worker import merge_workers, start_calibration
from vllm_longmamba.tables import LayerThresholds

A = torch.tensor([-0.01, 0.5, -0.1])


def test_start_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of random weights, whose A may be positive."""
    from vllm_longmamba.layers import filtered_mixer

    mixers = [SimpleNamespace(layer_index=layer, dt_recorder=None, A=SimpleNamespace(data=A)) for layer in (0, 3)]
    monkeypatch.setattr(filtered_mixer, "filtered_mixers", lambda model: mixers if model == "model" else [])
    worker = SimpleNamespace(get_model=lambda: "model")
    settings = replace(PAPER_SETTINGS, weights_fingerprint="dummy", train_length=4, max_length=8, num_sequences=1)
    start_calibration(worker, settings)
    assert worker.longmamba_recorder.settings == settings
    for mixer in mixers:
        mixer.dt_recorder(mixer.layer_index, torch.ones(4, 3))
    retention = worker.longmamba_recorder.finish()[3].retention
    torch.testing.assert_close(retention, torch.exp(-4 * A.abs().double()))


def test_merge_workers() -> None:
    """Two stages of two ranks each, in any order: channels by rank, layers of both stages."""

    def part(value: float) -> LayerThresholds:
        return LayerThresholds(torch.full((2,), value, dtype=torch.float64), torch.full((3, 2), value))

    results = [(1, {5: part(0.4)}), (0, {0: part(0.1)}), (1, {0: part(0.2)}), (0, {5: part(0.3)})]
    merged = merge_workers(results)
    assert list(merged) == [0, 5]
    assert merged[0].retention.tolist() == [0.1, 0.1, 0.2, 0.2]
    assert merged[5].retention.tolist() == [0.3, 0.3, 0.4, 0.4]
    assert merged[5].dt_threshold[2].tolist() == pytest.approx([0.3, 0.3, 0.4, 0.4])
