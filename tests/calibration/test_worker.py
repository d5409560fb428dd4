"""Tests of vllm_longmamba/calibration/worker.py: what every worker records, and how their parts are joined."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from calibration_settings import PAPER_SETTINGS
from small_tables import small_table

from vllm_longmamba.calibration.worker import finish_calibration, merge_workers, start_calibration, use_table
from vllm_longmamba.tables import LayerThresholds, table_to_bytes

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


def test_finish_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    """No mixer goes on recording what users ask."""
    from vllm.distributed import parallel_state

    from vllm_longmamba.layers import filtered_mixer

    mixers = [
        SimpleNamespace(layer_index=layer, dt_recorder=None, A=SimpleNamespace(data=-A.abs())) for layer in (0, 3)
    ]
    monkeypatch.setattr(filtered_mixer, "filtered_mixers", lambda model: mixers)
    monkeypatch.setattr(parallel_state, "get_tensor_model_parallel_rank", lambda: 1)
    worker = SimpleNamespace(get_model=lambda: "model")
    start_calibration(worker, replace(PAPER_SETTINGS, train_length=4, max_length=8, num_sequences=1))
    for mixer in mixers:
        mixer.dt_recorder(mixer.layer_index, torch.ones(4, 3))
    rank, layers = finish_calibration(worker)
    assert (rank, list(layers)) == (1, [0, 3])
    assert [mixer.dt_recorder for mixer in mixers] == [None, None]
    assert worker.longmamba_recorder is None


def test_use_table_keeps_to_the_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the user; and a start with a calibration samples as one without."""
    from vllm_longmamba.layers import replace_table

    given: list[Any] = []
    seeds: list[Any] = []
    monkeypatch.setattr(replace_table, "replace_table", lambda *args: given.append(args))
    monkeypatch.setattr("vllm.utils.torch_utils.set_random_seed", lambda *args: seeds.append(args))
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    options = {"min_retention": 0.25, "unfiltered_end": 4}
    worker = SimpleNamespace(
        get_model=lambda: "model",
        vllm_config=SimpleNamespace(additional_config={"longmamba": options}),
        model_config=SimpleNamespace(seed=5),
        parallel_config=SimpleNamespace(data_parallel_index=2),
    )
    use_table(worker, table_to_bytes(small_table()))
    ((model, made),) = given
    assert (model, made.table.digest()) == ("model", small_table().digest())
    assert (made.min_retention, made.unfiltered_end) == (0.25, 4)
    assert seeds == [(5, 2)]


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
