"""Tests of vllm_longmamba/calibration/worker.py: sequences in chunks, ranks and stages."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_longmamba.calibration.worker import (
    CalibrationRecorder,
    CalibrationWorkerExtension,
    merge_workers,
    start_calibration,
)
from vllm_longmamba.tables import LayerCalibration, LayerThresholds

LENGTH, CHANNELS, ROWS = 12, 3, [12, 18, 24]
A = -torch.tensor([0.01, 0.5, 0.1])


def sequences(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(LENGTH, CHANNELS, generator=generator) for _ in range(count)]


def recorder(layers: int = 1) -> CalibrationRecorder:
    made = CalibrationRecorder(LENGTH, ROWS, 5.0)
    for layer in range(layers):
        made.attach(SimpleNamespace(layer_index=layer, dt_recorder=None), A)
    return made


def expected(given: list[torch.Tensor]) -> LayerThresholds:
    calibration = LayerCalibration(A, LENGTH, ROWS, 5.0)
    for sequence in given:
        calibration.add(sequence)
    return calibration.result()


def test_a_recorder_combines_as_told() -> None:
    given = sequences(3)
    made = CalibrationRecorder(LENGTH, ROWS, 0.0, "clipped")
    made.attach(SimpleNamespace(layer_index=0, dt_recorder=None), A)
    calibration = LayerCalibration(A, LENGTH, ROWS, 0.0, "clipped")
    for sequence in given:
        made.record(0, sequence)
        calibration.add(sequence)
    assert_same(made.finish(3)[0], calibration.result())


def test_a_recorder_keeps_to_its_budget() -> None:
    given = sequences(2)
    made = CalibrationRecorder(LENGTH, ROWS, 0.0, "mean", 0.5)
    made.attach(SimpleNamespace(layer_index=0, dt_recorder=None), A)
    calibration, papers = LayerCalibration(A, LENGTH, ROWS, 0.0, budget=0.5), LayerCalibration(A, LENGTH, ROWS, 0.0)
    for sequence in given:
        made.record(0, sequence)
        calibration.add(sequence)
        papers.add(sequence)
    found = made.finish(2)[0]
    assert_same(found, calibration.result())
    assert bool((found.dt_threshold[1:] > papers.result().dt_threshold[1:]).all())


def test_a_recorder_knows_the_channels_of_its_rank() -> None:
    """The second of two ranks: its channel 1 is the layer's channel 4."""
    made = CalibrationRecorder(LENGTH, ROWS, 0.0, "mean", 0.5, ("0.4=0.25", "0.1=3", "1.4=3"))
    made.attach(SimpleNamespace(layer_index=0, dt_recorder=None), A, tp_rank=1)
    calibration = LayerCalibration(A, LENGTH, ROWS, 0.0, budget=torch.tensor([0.5, 0.25, 0.5]))
    for sequence in sequences(2):
        made.record(0, sequence)
        calibration.add(sequence)
    assert_same(made.finish(2)[0], calibration.result())


@pytest.mark.parametrize("budget", [1.0, 0.5])
def test_calibration_starts_with_all_settings(budget: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also through what `longmamba calibrate` calls."""
    from vllm.distributed import parallel_state

    from vllm_longmamba.layers import filtered_mixer

    mixers = [SimpleNamespace(layer_index=layer, dt_recorder=None, A=SimpleNamespace(data=A)) for layer in (0, 3)]
    monkeypatch.setattr(filtered_mixer, "filtered_mixers", lambda model: mixers if model == "model" else [])
    monkeypatch.setattr(parallel_state, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(parallel_state, "get_tensor_model_parallel_world_size", lambda: 2)
    worker = SimpleNamespace(get_model=lambda: "model")
    channels = start_calibration(worker, LENGTH, ROWS, 3.0, "clipped", budget, dummy_weights=True)
    assert channels == {0: 2 * len(A), 3: 2 * len(A)}
    settings = worker.longmamba_recorder
    assert (settings.train_length, settings.row_lengths, settings.clamp_percent) == (LENGTH, ROWS, 3.0)
    assert (settings.combine, settings.budget) == ("clipped", budget)
    assert all(mixer.dt_recorder is not None for mixer in mixers)
    CalibrationWorkerExtension.longmamba_start_calibration(worker, LENGTH, ROWS, 0.0, "mean", budget, ("0.1=2",))  # type: ignore[arg-type]
    settings = worker.longmamba_recorder
    assert (settings.combine, settings.budget, settings.channel_budgets) == ("mean", budget, ("0.1=2",))


def assert_same(found: LayerThresholds, wanted: LayerThresholds) -> None:
    assert torch.equal(found.retention, wanted.retention)
    assert torch.equal(found.dt_threshold, wanted.dt_threshold)


@pytest.mark.parametrize(
    "chunks",
    [[13], [12, 0], [5, 8], [4, 4, 4, 0], [6, 6, 0], [1] * 12 + [0], [11, 2]],
    ids=lambda chunks: "+".join(map(str, chunks)),
)
def test_record_a_sequence_in_chunks(chunks: list[int]) -> None:
    """One token follows the sequence, which does not count; alone, it is a decode step and comes without tokens."""
    given = sequences(2)
    made = recorder(layers=2)
    for sequence in given:
        longer = torch.cat([sequence, torch.full((1, CHANNELS), 7.0)])
        begin = 0
        for tokens in chunks:
            for layer in range(2):
                made.record(layer, longer[begin : begin + tokens] + layer)
            begin += tokens
    found = made.finish(2)
    assert list(found) == [0, 1]
    assert_same(found[0], expected(given))
    assert_same(found[1], expected([sequence + 1 for sequence in given]))


@pytest.mark.parametrize("tokens", [0, 5, 12 + 12], ids=["none", "part", "two of one"])
def test_finish_refuses_what_is_not_whole(tokens: int) -> None:
    made = recorder()
    made.record(0, torch.rand(min(tokens, LENGTH), CHANNELS))
    made.record(0, torch.rand(max(0, tokens - LENGTH), CHANNELS))
    with pytest.raises(RuntimeError, match="every layer must have seen 1 whole sequences of 12 tokens"):
        made.finish(1)


def test_finish_without_layers() -> None:
    """A pipeline stage may have none."""
    assert recorder(layers=0).finish(3) == {}


def test_merge_workers() -> None:
    """Two stages of two ranks each, in any order: channels by rank, layers of both stages."""

    def part(value: float) -> Any:
        return torch.full((2,), value, dtype=torch.float64), torch.full((3, 2), value)

    results = [(1, {5: part(0.4)}), (0, {0: part(0.1)}), (1, {0: part(0.2)}), (0, {5: part(0.3)})]
    merged = merge_workers(results)
    assert list(merged) == [0, 5]
    assert merged[0].retention.tolist() == [0.1, 0.1, 0.2, 0.2]
    assert merged[5].retention.tolist() == [0.3, 0.3, 0.4, 0.4]
    assert merged[5].dt_threshold[2].tolist() == pytest.approx([0.3, 0.3, 0.4, 0.4])
