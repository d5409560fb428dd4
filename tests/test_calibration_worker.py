"""Tests of vllm_longmamba/calibration_worker.py: sequences in chunks, ranks and stages."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_longmamba.calibration_worker import CalibrationRecorder, merge_workers
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
