"""Closed-loop calibration without an engine: the recorder, the sequences, the settings, what a table tells of it."""

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from calibration_plans import PAPER_PLAN
from safetensors import safe_open
from small_tables import small_table
from typer.testing import CliRunner

import vllm_longmamba.calibration.offline as calibrate_module
from vllm_longmamba.calibration.closed_loop import (
    ClosedLoopRecorder,
    close_loop,
    closed_loop_sequences,
    long_sequences,
    start_length,
)
from vllm_longmamba.calibration.plan import PLAN_KEY, _measured_lengths, plan_from_config
from vllm_longmamba.calibration.sequences import draw_sequences
from vllm_longmamba.calibration.settings import CalibrationSettings
from vllm_longmamba.calibration.worker import CalibrationRecorder
from vllm_longmamba.cli import app
from vllm_longmamba.options import CALIBRATION_METHODS, options_from_config
from vllm_longmamba.tables import (
    METHODS,
    ClosedLoop,
    TableMetadata,
    ThresholdTable,
    budget_thresholds,
    combine_thresholds,
    interpolate_thresholds,
    load_table,
    save_table,
)

LENGTH, ROWS, THETA = 12, [12, 18, 24, 48], 1e-2
A = -torch.tensor([0.01, 5.0, 0.1])
CLOSED = ClosedLoop(combine="min", lengths=(18, 36), text_tokens=400)
CLOSED_PLAN = replace(PAPER_PLAN, method="closed-loop", combine="median")


def dt_of(count: int, length: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(length, 3, generator=generator) for _ in range(count)]


def recorder(combine: str = "median", factor: float = 1.0) -> ClosedLoopRecorder:
    calibration = CalibrationRecorder(LENGTH, ROWS, 5.0)
    for layer in range(2):
        calibration.attach(SimpleNamespace(layer_index=layer, dt_recorder=None), A)
    for sequence in dt_of(3, LENGTH, seed=0):
        for layer in range(2):
            calibration.record(layer, sequence * (layer + 1))
    return ClosedLoopRecorder(calibration, THETA, [18, 36], combine, factor)


@pytest.mark.parametrize(("combine", "factor"), [("median", 1.0), ("min", 1.0), ("mean", 0.5)])
def test_recorder(combine: str, factor: float) -> None:
    made = recorder(combine, factor)
    plain = torch.stack(dt_of(3, LENGTH, seed=0)).double()
    is_global = torch.exp(A.double() * plain.sum(1)).mean(0) > THETA
    assert is_global.tolist() == [True, False, True]
    sequences = {length: dt_of(2, length, seed=length) for length in (18, 36)}
    for length, given in sequences.items():
        made.start_length(length)
        for sequence in given:
            for layer in range(2):
                # The token that follows is filtered with the others, but does not count.
                returned = made.record(layer, torch.cat([sequence, torch.full((1, 3), 9.0)]))
                budget = factor * plain.sum(1).mean(0) * (layer + 1)
                assert returned is not None
                assert returned.tolist() == torch.where(is_global, budget_thresholds(sequence, budget), -1.0).tolist()
                assert made.record(layer, sequence[:0]) is None
    found = made.finish(2)
    for layer in range(2):
        budget = factor * plain.sum(1).mean(0) * (layer + 1)
        each = [torch.stack([budget_thresholds(one, budget) for one in given]) for given in sequences.values()]
        measured = torch.stack([combine_thresholds(both, combine) for both in each])
        # Thresholds of local channels are there for another theta.
        assert torch.equal(found[layer].dt_threshold, interpolate_thresholds([18, 36], measured, ROWS))
        torch.testing.assert_close(found[layer].retention, torch.exp(A * plain.sum(1) * (layer + 1)).mean(0))


def test_recorder_refuses_what_is_missing_or_cut() -> None:
    made = recorder()
    with pytest.raises(RuntimeError, match=r"must have seen 1 sequences of each of \[18, 36\] tokens"):
        made.finish(1)
    for length in (18, 36):
        made.start_length(length)
        for layer in range(2):
            assert made.record(layer, torch.rand(length - 1, 3)) is None
            made.record(layer, torch.rand(length, 3))
    with pytest.raises(RuntimeError, match=r"chunks of \[17, 35\] tokens; raise --max-num-batched-tokens to 37"):
        made.finish(1)


def test_close_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every mixer of the worker gets the new recorder, once all have seen the sequences of the training length."""
    mixers = [SimpleNamespace(layer_index=layer, dt_recorder=None) for layer in range(2)]
    monkeypatch.setattr("vllm_longmamba.layers.filtered_mixer.filtered_mixers", lambda model: mixers)
    calibration = CalibrationRecorder(LENGTH, ROWS, 5.0)
    for mixer in mixers:
        calibration.attach(mixer, A)
    worker = SimpleNamespace(longmamba_recorder=calibration, get_model=lambda: None)
    with pytest.raises(RuntimeError, match="must have seen 1 whole sequences"):
        close_loop(worker, 1, THETA, [18], "min")
    for layer in range(2):
        calibration.record(layer, torch.rand(LENGTH, 3))
    close_loop(worker, 1, THETA, [18], "min")
    start_length(worker, 18)
    for mixer in mixers:
        assert mixer.dt_recorder is worker.longmamba_recorder
        assert mixer.dt_recorder.record(mixer.layer_index, torch.rand(18, 3)) is not None
    assert sorted(worker.longmamba_recorder.finish(1)) == [0, 1]


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


def test_settings_refuse() -> None:
    with pytest.raises(ValueError, match="method must be one of unclamped, paper, closed-loop, got 'closed'"):
        CalibrationSettings(method="closed")
    with pytest.raises(ValueError, match="combine must be one of median, min, mean, clipped, got 'max'"):
        CalibrationSettings(combine="max")
    with pytest.raises(ValueError, match="budget must be a factor above 0, got -1"):
        CalibrationSettings(budget=-1)
    with pytest.raises(ValueError, match=r"method unclamped has no clamp, got clamp_percent 5"):
        CalibrationSettings(method="unclamped", clamp_percent=5)
    with pytest.raises(ValueError, match="method paper takes the mean over the sequences, got combine 'median'"):
        CalibrationSettings(method="paper", combine="median")


@pytest.mark.parametrize(
    ("settings", "method", "theta", "clamps", "combine"),
    [
        (CalibrationSettings(), "unclamped", 0.05, (0, 0), "clipped"),
        (CalibrationSettings(clamp_percent=0), "unclamped", 0.05, (0, 0), "clipped"),
        (CalibrationSettings(combine="mean"), "unclamped", 0.05, (0, 0), "mean"),
        (CalibrationSettings(clamp_percent=3), "paper", 0.01, (3, 3), "mean"),
        (CalibrationSettings(method="paper"), "paper", 0.01, (20, 5), "mean"),
        (CalibrationSettings(method="paper", clamp_percent=0, min_retention=0.2), "paper", 0.2, (0, 0), "mean"),
        (CalibrationSettings(method="closed-loop"), "closed-loop", 0.05, (20, 5), "median"),
    ],
)
def test_defaults_of_a_method(
    settings: CalibrationSettings, method: str, theta: float, clamps: tuple[float, float], combine: str
) -> None:
    assert (settings.method, settings.theta, settings.way_to_combine) == (method, theta, combine)
    assert (settings.clamp("MambaForCausalLM"), settings.clamp("Mamba2ForCausalLM")) == clamps


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


def test_option() -> None:
    assert CALIBRATION_METHODS == METHODS
    assert options_from_config({}).calibration_method == "unclamped"
    assert options_from_config({"longmamba": {"calibration_method": "closed-loop"}}).calibration_method == "closed-loop"
    with pytest.raises(ValueError, match='calibration_method must be "unclamped" or "paper" or "closed-loop", but is'):
        options_from_config({"longmamba": {"calibration_method": "open"}})


def test_plan() -> None:
    """A closed loop is another table, and of other lengths yet another; the paper's keep the keys they had."""
    paper, closed = PAPER_PLAN, replace(CLOSED_PLAN, measured_lengths=(144, 288))
    longer = replace(closed, measured_lengths=(144, 288, 576))
    unclamped = replace(paper, method="unclamped", clamp_percent=0.0, min_retention=0.05, combine="clipped")
    assert paper.key() == "68ea5378dc0021398e77591659236e27"
    plans = (paper, closed, longer, unclamped, replace(unclamped, combine="mean"))
    assert len({plan.key() for plan in plans}) == len(plans)
    assert (paper.metadata().combine, unclamped.metadata().combine) == ("mean", "clipped")
    assert plan_from_config(json.loads(json.dumps({PLAN_KEY: asdict(closed)}))) == closed
    assert (paper.metadata(7).method, paper.metadata(7).closed_loop) == ("paper", None)
    expected = ClosedLoop(combine="median", lengths=(144, 288), text_tokens=7)
    assert (closed.metadata(7).method, closed.metadata(7).closed_loop) == ("closed-loop", expected)


@pytest.mark.parametrize(
    ("steps", "positions", "expected"),
    [(289, 5000, (144, 288)), (290, 5000, (144, 288, 289)), (5000, 290, (144, 288)), (145, 5000, (144,))],
)
def test_lengths_of_an_engine(steps: int, positions: int, expected: tuple[int, ...]) -> None:
    assert _measured_lengths(CLOSED_PLAN, engine_config(steps, positions)) == expected
    assert _measured_lengths(PAPER_PLAN, engine_config(steps, positions)) == ()


@pytest.mark.parametrize(("steps", "positions", "caching"), [(144, 5000, False), (500, 145, False), (500, 5000, True)])
def test_engine_too_small(steps: int, positions: int, caching: bool) -> None:
    with pytest.raises(ValueError, match="--max-num-batched-tokens of at least 145"):
        _measured_lengths(CLOSED_PLAN, engine_config(steps, positions, caching))


def engine_config(steps: int, positions: int, caching: bool = False) -> Any:
    return SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_batched_tokens=steps),
        model_config=SimpleNamespace(max_model_len=positions),
        cache_config=SimpleNamespace(enable_prefix_caching=caching),
    )


def closed_table() -> ThresholdTable:
    table = small_table()
    return replace(table, metadata=replace(table.metadata, method="closed-loop", closed_loop=CLOSED))


def test_table_file(tmp_path: Path) -> None:
    save_table(closed_table(), tmp_path / "closed")
    assert load_table(tmp_path / "closed").metadata == closed_table().metadata
    save_table(small_table(), tmp_path / "paper")
    with safe_open(tmp_path / "paper", framework="numpy") as file:
        # Earlier releases read the paper's tables.
        assert "closed_loop" not in json.loads(file.metadata()["longmamba"])
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
        ({"lengths": ()}, "lengths must ascend, and be at least one"),
        ({"lengths": (36, 18)}, "lengths must ascend"),
        ({"lengths": (18, "36")}, "must be integers above 0"),
        ({"text_tokens": 0}, "must be integers above 0"),
        ({"budget": 0}, "budget must be a factor above 0, got 0"),
    ],
)
def test_closed_loop_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CLOSED, **change)


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def groups(number: int, model: str, texts: Any, settings: Any, **kwargs: Any) -> Iterator[ThresholdTable]:
        seen.append(settings)
        yield closed_table()

    monkeypatch.setattr(calibrate_module, "calibrate_groups", groups)
    arguments = ["calibrate", "m", "--output", str(tmp_path / "table"), "--method", "closed-loop"]
    result = CliRunner().invoke(app, [*arguments, "--combine", "min", "--measure-to", "300", "--budget", "0.5"])
    assert result.exit_code == 0, result.output
    assert seen == [CalibrationSettings(method="closed-loop", combine="min", measure_to=300, budget=0.5)]
    assert load_table(tmp_path / "table").metadata.closed_loop == CLOSED
    result = CliRunner().invoke(app, ["calibrate", "m", "--method", "open"])
    assert (result.exit_code, "method must be one of unclamped, paper, closed-loop" in result.output) == (1, True)
