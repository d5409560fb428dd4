"""Closed-loop calibration without an engine: the recorder, the sequences, what a table tells of it."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from calibration_settings import PAPER_SETTINGS
from small_tables import small_table

from vllm_longmamba.calibration.closed_loop import (
    ClosedLoopRecorder,
    close_loop,
    closed_loop_sequences,
    long_sequences,
)
from vllm_longmamba.calibration.recorder import CalibrationRecorder
from vllm_longmamba.calibration.sequences import draw_sequences
from vllm_longmamba.tables import (
    ClosedLoop,
    TableMetadata,
    ThresholdTable,
    budget_thresholds,
    combine_thresholds,
    interpolate_thresholds,
    load_table,
    save_table,
)

LENGTH, ROWS, THETA = 12, [12, 18, 24, 30, 36, 42, 48], 1e-2
A = -torch.tensor([0.01, 5.0, 0.1])
CLOSED = ClosedLoop(combine="min", lengths=(18, 36), text_tokens=400)
SETTINGS = replace(
    PAPER_SETTINGS,
    method="closed-loop",
    combine="median",
    train_length=LENGTH,
    max_length=ROWS[-1],
    measured_lengths=(18, 36),
)


def dt_of(count: int, length: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(length, 3, generator=generator) for _ in range(count)]


def recorder(combine: str = "median", factor: float = 1.0, number: int = 3) -> ClosedLoopRecorder:
    calibration = CalibrationRecorder(replace(SETTINGS, combine=combine, budget=factor, num_sequences=number))
    for layer in range(2):
        calibration.attach(SimpleNamespace(layer_index=layer, dt_recorder=None), A)
    for sequence in dt_of(number, LENGTH, seed=0):
        for layer in range(2):
            calibration.record(layer, sequence * (layer + 1))
    return ClosedLoopRecorder(calibration)


@pytest.mark.parametrize(("combine", "factor"), [("median", 1.0), ("min", 1.0), ("mean", 0.5)])
def test_recorder(combine: str, factor: float) -> None:
    made = recorder(combine, factor)
    plain = torch.stack(dt_of(3, LENGTH, seed=0)).double()
    is_global = torch.exp(A.double() * plain.sum(1)).mean(0) > THETA
    assert is_global.tolist() == [True, False, True]
    sequences = {length: dt_of(3, length, seed=length) for length in (18, 36)}
    for given in sequences.values():
        for sequence in given:
            for layer in range(2):
                # The token that follows is filtered with the others, but does not count.
                returned = made.record(layer, torch.cat([sequence, torch.full((1, 3), 9.0)]))
                budget = factor * plain.sum(1).mean(0) * (layer + 1)
                assert returned is not None
                assert returned.tolist() == torch.where(is_global, budget_thresholds(sequence, budget), -1.0).tolist()
                assert made.record(layer, sequence[:0]) is None
    found = made.finish()
    for layer in range(2):
        budget = factor * plain.sum(1).mean(0) * (layer + 1)
        each = [torch.stack([budget_thresholds(one, budget) for one in given]) for given in sequences.values()]
        measured = torch.stack([combine_thresholds(both, combine) for both in each])
        # Thresholds of local channels are there for another theta.
        assert torch.equal(found[layer].dt_threshold, interpolate_thresholds([18, 36], measured, ROWS))
        torch.testing.assert_close(found[layer].retention, torch.exp(A * plain.sum(1) * (layer + 1)).mean(0))


def test_recorder_refuses_what_is_missing_or_cut() -> None:
    made = recorder(number=1)
    with pytest.raises(RuntimeError, match=r"must have seen 1 sequences of each of \[18, 36\] tokens"):
        made.finish()
    for length in (18, 36):
        for layer in range(2):
            assert made.record(layer, torch.rand(length, 3)) is None
            assert made.record(layer, torch.rand(length + 1, 3)) is not None
    with pytest.raises(RuntimeError, match=r"chunks of \[18, 36\] tokens; raise --max-num-batched-tokens to 37"):
        made.finish()


def test_close_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every mixer of the worker gets the new recorder, once all have seen the sequences of the training length."""
    mixers = [SimpleNamespace(layer_index=layer, dt_recorder=None) for layer in range(2)]
    monkeypatch.setattr("vllm_longmamba.layers.filtered_mixer.filtered_mixers", lambda model: mixers)
    calibration = CalibrationRecorder(replace(SETTINGS, num_sequences=1, measured_lengths=(18,)))
    for mixer in mixers:
        calibration.attach(mixer, A)
    worker = SimpleNamespace(longmamba_recorder=calibration, get_model=lambda: None)
    with pytest.raises(RuntimeError, match="must have seen 1 whole sequences"):
        close_loop(worker)
    for layer in range(2):
        calibration.record(layer, torch.rand(LENGTH, 3))
    close_loop(worker)
    for mixer in mixers:
        assert mixer.dt_recorder is worker.longmamba_recorder
        assert mixer.dt_recorder.record(mixer.layer_index, torch.rand(19, 3)) is not None
    assert sorted(worker.longmamba_recorder.finish()) == [0, 1]


def test_long_sequences() -> None:
    texts = [list(range(100)), list(range(1000, 1050))]
    assert long_sequences(texts, 50, 3, seed=4) == draw_sequences(texts, 50, 3, seed=4)
    joined = texts[0] + texts[1]
    for length in (60, 150, 400):
        sequences = long_sequences(texts, length, 3, seed=4)
        assert sequences == long_sequences(texts, length, 3, seed=4)
        places = [joined.index(sequence[0]) for sequence in sequences]
        assert [(place - places[0]) % 150 for place in places] == [0, 50, 100]
        for place, sequence in zip(places, sequences, strict=True):
            assert sequence == [joined[(place + step) % 150] for step in range(length)]
    both = long_sequences(texts, 50, 2, seed=4) + long_sequences(texts, 60, 2, seed=4)
    assert closed_loop_sequences(texts, [50, 60], 2, seed=4) == both


def test_a_table_without_a_clamp_says_so() -> None:
    unclamped = replace(small_table().metadata, method="unclamped", clamp_percent=0)
    assert TableMetadata.from_dict(unclamped.to_dict()) == unclamped
    with pytest.raises(ValueError, match=r"with the method 'unclamped' clamp_percent must be 0, got 5"):
        replace(unclamped, clamp_percent=5)


def test_a_table_tells_how_its_sequences_were_combined() -> None:
    papers = small_table().metadata
    assert (papers.method, papers.combine) == ("paper", "mean")
    clipped = replace(papers, method="unclamped", clamp_percent=0, combine="clipped")
    assert TableMetadata.from_dict(json.loads(json.dumps(clipped.to_dict()))) == clipped
    with pytest.raises(ValueError, match="combine must be one of median, min, mean, clipped, got 'max'"):
        replace(clipped, combine="max")
    with pytest.raises(ValueError, match="combine must be 'mean' with the method 'paper', got 'median'"):
        replace(papers, combine="median")


def closed_table() -> ThresholdTable:
    table = small_table()
    return replace(table, metadata=replace(table.metadata, method="closed-loop", closed_loop=CLOSED))


def test_table_file(tmp_path: Path) -> None:
    save_table(closed_table(), tmp_path / "closed")
    assert load_table(tmp_path / "closed").metadata == closed_table().metadata
    save_table(small_table(), tmp_path / "paper")
    assert load_table(tmp_path / "paper").metadata == small_table().metadata


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"closed_loop": None}, "must be given with the method 'closed-loop' and no other"),
        ({"method": "paper"}, "must be given with the method 'closed-loop' and no other"),
    ],
)
def test_metadata_refuse(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(closed_table().metadata, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"combine": "max"}, "combine must be one of"),
        ({"lengths": ()}, "that ascend, got 0 that do not"),
        ({"lengths": (36, 18)}, "that ascend, got 2 that do not"),
        ({"lengths": (18, "36")}, "that ascend, got 2 that do not"),
        ({"text_tokens": 0}, "text_tokens must be an integer, 1 to"),
        ({"budget": 0}, "budget must be a factor above 0, got 0"),
    ],
)
def test_closed_loop_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CLOSED, **change)
