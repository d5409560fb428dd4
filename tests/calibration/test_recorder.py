"""Tests of vllm_longmamba/calibration/recorder.py: sequences in chunks, the channels of ranks."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from calibration_settings import PAPER_SETTINGS

from vllm_longmamba.calibration.recorder import CalibrationRecorder
from vllm_longmamba.tables import LayerCalibration, LayerThresholds

LENGTH, CHANNELS, ROWS = 12, 3, [12, 18, 24]
A = -torch.tensor([0.01, 0.5, 0.1])
SETTINGS = replace(PAPER_SETTINGS, train_length=LENGTH, max_length=ROWS[-1], num_sequences=2)
UNCLAMPED = replace(SETTINGS, method="unclamped", clamp_percent=0.0)


def sequences(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(LENGTH, CHANNELS, generator=generator) for _ in range(count)]


def recorder(layers: int = 1, **changes: Any) -> CalibrationRecorder:
    made = CalibrationRecorder(replace(SETTINGS, **changes))
    for layer in range(layers):
        made.attach(SimpleNamespace(layer_index=layer, dt_recorder=None), A)
    return made


def expected(given: list[torch.Tensor]) -> LayerThresholds:
    calibration = LayerCalibration(A, LENGTH, ROWS, 5.0)
    for sequence in given:
        calibration.add(sequence)
    return calibration.result()


def test_a_recorder_keeps_to_its_method() -> None:
    given = sequences(3)
    made = CalibrationRecorder(replace(UNCLAMPED, num_sequences=3, budget=1.0))
    made.attach(SimpleNamespace(layer_index=0, dt_recorder=None), A)
    calibration = LayerCalibration(A, LENGTH, ROWS, 0.0, "unclamped")
    for sequence in given:
        made.record(0, sequence)
        calibration.add(sequence)
    assert_same(made.finish()[0], calibration.result())


def test_a_recorder_keeps_to_its_budget() -> None:
    given = sequences(2)
    made = CalibrationRecorder(replace(UNCLAMPED, budget=0.5))
    made.attach(SimpleNamespace(layer_index=0, dt_recorder=None), A)
    calibration, papers = (LayerCalibration(A, LENGTH, ROWS, 0.0, "unclamped", budget) for budget in (0.5, 1.0))
    for sequence in given:
        made.record(0, sequence)
        calibration.add(sequence)
        papers.add(sequence)
    found = made.finish()[0]
    assert_same(found, calibration.result())
    assert bool((found.dt_threshold[1:] > papers.result().dt_threshold[1:]).all())


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
    found = made.finish()
    assert list(found) == [0, 1]
    assert_same(found[0], expected(given))
    assert_same(found[1], expected([sequence + 1 for sequence in given]))


@pytest.mark.parametrize("tokens", [0, 5, 12 + 5, 12 + 12], ids=["none", "part", "a part of another", "two of one"])
def test_finish_refuses_what_is_not_whole(tokens: int) -> None:
    made = recorder(num_sequences=1)
    made.record(0, torch.rand(min(tokens, LENGTH), CHANNELS))
    made.record(0, torch.rand(max(0, tokens - LENGTH), CHANNELS))
    with pytest.raises(RuntimeError, match="every layer must have seen 1 whole sequences of 12 tokens"):
        made.finish()


def test_finish_without_layers() -> None:
    """A pipeline stage may have none."""
    assert recorder(layers=0).finish() == {}
