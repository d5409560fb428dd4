"""Closed-loop calibration through the real engine, against the independent reference that closes the loop itself."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from references.reference_lm import TimeSteps, _logprobs, _read_weights, reference_dt
from tiny_models import random_token_ids

import vllm_longmamba.tables.shipped as shipped
from vllm_longmamba.calibration.closed_loop import closed_loop_sequences
from vllm_longmamba.calibration.offline import calibrate
from vllm_longmamba.calibration.sequences import draw_sequences
from vllm_longmamba.calibration.settings import CalibrationSettings
from vllm_longmamba.tables import (
    CLOSED_LOOP,
    DEFAULT_MIN_RETENTION,
    ClosedLoop,
    ThresholdTable,
    interpolate_thresholds,
    load_table,
)

from .harness import EAGER, TRAIN_LENGTH, Engine

pytestmark = pytest.mark.engine

# Theta is what an engine takes that calibrates itself.
SEQUENCES, THETA, SEED = 3, DEFAULT_MIN_RETENTION[CLOSED_LOOP], 5


class ClosingSteps(TimeSteps):
    """Takes each layer's thresholds from its dt by the definition, and filters with them.

    Args:
        budgets: layer -> (channels,), infinite in local channels, whose thresholds are not compared.
    """

    def __init__(self, budgets: dict[int, torch.Tensor]) -> None:
        super().__init__(0, {})
        self.budgets = budgets
        self.found: dict[int, torch.Tensor] = {}

    def is_filtered(self, layer: int, dt: torch.Tensor) -> torch.Tensor:
        """See `TimeSteps`."""
        self.dt[layer] = dt
        descending = dt.double().sort(dim=0, descending=True).values
        within = (descending.cumsum(0) <= self.budgets[layer]).sum(0)
        padded = torch.cat([descending, torch.full_like(descending[:1], -1.0)])
        self.found[layer] = padded.gather(0, within[None])[0]
        return dt <= self.found[layer]


def assert_closed_loop(model: Path, table: ThresholdTable, texts: list[list[int]], number: int, seed: int) -> None:
    """Compare a table, made with medians, with what the reference finds in its global channels."""
    closed_loop = table.metadata.closed_loop
    assert table.metadata.method == "closed-loop"
    assert closed_loop is not None
    plain = [reference_dt(model, sequence) for sequence in draw_sequences(texts, TRAIN_LENGTH, number, seed)]
    A_logs = {name: value for name, value in _read_weights(model).items() if name.endswith("A_log")}
    budgets, is_global = {}, {}
    for layer in table.layers:
        (A_log,) = (value.double() for name, value in A_logs.items() if f"layers.{layer}." in name)
        sums = torch.stack([dt[layer].double().sum(0) for dt in plain])
        decays = torch.exp(-A_log.exp().reshape(1, len(A_log), -1) * sums[..., None])
        is_global[layer] = decays.mean((0, 2)) > THETA
        budgets[layer] = torch.where(is_global[layer], sums.mean(0), torch.inf)
    found: dict[int, dict[int, list[torch.Tensor]]] = {layer: {} for layer in table.layers}
    for sequence in closed_loop_sequences(texts, closed_loop.lengths, number, seed):
        steps = ClosingSteps(budgets)
        _logprobs(model, sequence, steps, torch.float64)
        for layer, thresholds in steps.found.items():
            found[layer].setdefault(len(sequence), []).append(thresholds)
    agree = []
    for layer, by_length in found.items():
        medians = torch.stack([torch.stack(by_length[length]).quantile(0.5, dim=0) for length in closed_loop.lengths])
        expected = interpolate_thresholds(closed_loop.lengths, medians, table.row_lengths)[:, is_global[layer]]
        mine = table.layers[layer].dt_threshold[:, is_global[layer]]
        assert torch.equal(table.is_global(layer, THETA), is_global[layer])
        # A sum that all but equals the budget: rounding decides between two neighbouring dt's of one sequence.
        agree.append(np.isclose(mine, expected, rtol=1e-3).ravel())
    assert np.concatenate(agree).mean() > 0.98
    assert sum(int(layer.sum()) for layer in is_global.values()) > 10


@pytest.mark.parametrize("family", ["mamba1", "zamba2"])
def test_calibrate(family: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    model, tokens = tiny_model(family), random_token_ids(2000, seed=1)
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(token % 96 + 32) for token in tokens))
    settings = CalibrationSettings(
        num_sequences=SEQUENCES,
        clamp_percent=10.0,
        min_retention=THETA,
        train_length=TRAIN_LENGTH,
        max_length=500,
        seed=SEED,
        method="closed-loop",
        measure_to=400,
        texts=(str(text),),
    )
    table = calibrate(str(model), settings, dtype="float32", **EAGER)
    assert table.metadata.closed_loop == ClosedLoop(combine="median", lengths=(144, 288, 400), text_tokens=2000)
    assert_closed_loop(model, table, [list(text.read_bytes())], SEQUENCES, SEED)


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Engine]:
    """Function: (model, engine arguments) -> an engine without a table; the cache is an empty one."""
    own = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    monkeypatch.setenv("VLLM_CACHE_ROOT", os.environ.get("VLLM_CACHE_ROOT", str(own / "vllm")))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("vllm_longmamba.calibration.prepare.DEFAULT_MAX_MODEL_LEN", 1024)
    monkeypatch.setattr(shipped, "__path__", [str(tmp_path / "none")])

    def run(model: Path, **arguments: Any) -> Engine:
        options = {"longmamba": {"train_length": TRAIN_LENGTH, "calibration_method": "closed-loop"}}
        given = {"model_impl": "longmamba", "additional_config": options, "max_model_len": 1024}
        return Engine(model, **(given | arguments))

    return run


def test_engine_makes_its_table(
    start: Callable[..., Engine], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    from tokenizers import Tokenizer

    from vllm_longmamba.calibration.text import sample_corpus

    model = tiny_model("mamba2")
    engine = start(model, max_num_batched_tokens=600, max_model_len=501)
    (stored,) = (tmp_path / "cache" / "vllm_longmamba").iterdir()
    table = load_table(stored)
    assert table.metadata.closed_loop is not None
    assert table.metadata.closed_loop.lengths == (144, 288, 499)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    texts = [tokenizer.encode(text).ids for text in sample_corpus().texts]
    assert_closed_loop(model, table, texts, 5, 0)
    prompt = random_token_ids(333, seed=5)
    (result,) = engine.generate([prompt])
    engine.close()
    filters = {layer: table.thresholds(layer)[table.row_of(333)] for layer in table.layers}
    steps = TimeSteps(333, filters)
    expected = _logprobs(model, prompt + result.tokens, steps, torch.float64)[332:-1].numpy()
    np.testing.assert_allclose(result.logprobs, expected, rtol=0, atol=1e-3)


def test_engine_refuses_to_cut_sequences(start: Callable[..., Engine], tiny_model: Callable[[str], Path]) -> None:
    for arguments in ({"max_num_batched_tokens": 144}, {"max_num_batched_tokens": 500, "enable_prefix_caching": True}):
        with pytest.raises(ValueError, match="runs whole sequences in one step each"):
            start(tiny_model("mamba2"), **arguments)
