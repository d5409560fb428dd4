"""`longmamba calibrate` through the real engine, against DESIGN's formulas on the reference's dt."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from references.reference_lm import _read_weights, reference_dt
from tiny_models import random_token_ids

from vllm_longmamba.calibration.offline import calibrate
from vllm_longmamba.calibration.sequences import draw_sequences
from vllm_longmamba.calibration.settings import CalibrationSettings
from vllm_longmamba.tables import LayerCalibration

from .harness import EAGER, TRAIN_LENGTH

pytestmark = pytest.mark.engine


@pytest.mark.parametrize(
    ("family", "clamp_percent", "method", "budget"),
    [("mamba1", 10.0, "paper", 1.0), ("mamba2", None, "unclamped", 0.5)],
)
def test_calibrate(
    family: str,
    clamp_percent: float | None,
    method: str,
    budget: float,
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    """The paper's method with a clamp of its own, and the default with a budget and an unfiltered end; two seeds."""
    model = tiny_model(family)
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(token % 96 + 32) for token in random_token_ids(2000, seed=1)))
    settings = CalibrationSettings(
        num_sequences=3,
        train_length=TRAIN_LENGTH,
        max_length=400,
        clamp_percent=clamp_percent,
        seed=5,
        budget=budget,
        unfiltered_end=64 if budget != 1 else 0,
        texts=(str(text),),
    )
    made = [calibrate(str(model), replace(settings, seed=seed), dtype="float32", **EAGER) for seed in (5, 6)]

    assert [table.metadata.seed for table in made] == [5, 6]
    assert made[0].digest() != made[1].digest()
    weights = _read_weights(model)
    for table in made:
        assert (table.metadata.method, table.metadata.budget) == (method, budget)
        assert table.unfiltered_end() == settings.unfiltered_end
        sequences = draw_sequences([list(text.read_bytes())], TRAIN_LENGTH, 3, table.metadata.seed)
        for layer, thresholds in table.layers.items():
            A = -torch.exp(weights[f"backbone.layers.{layer}.mixer.A_log"].double())
            expected = LayerCalibration(A, TRAIN_LENGTH, table.row_lengths, clamp_percent or 0.0, method, budget)
            for sequence in sequences:
                expected.add(reference_dt(model, sequence)[layer].float())
            np.testing.assert_allclose(thresholds.retention, expected.result().retention, rtol=1e-3)
            np.testing.assert_allclose(thresholds.dt_threshold, expected.result().dt_threshold, rtol=1e-3)
