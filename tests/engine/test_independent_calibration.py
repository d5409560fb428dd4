"""`calibrate` through the real engine against the second implementation, on the plain-torch model's dt's.

Nothing of vllm_longmamba computes the expected numbers: the dt's come from reference_lm, their use from
independent_calibration.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from example_modules import EXAMPLES
from references import independent_calibration
from references.reference_lm import _read_weights, reference_dt

from vllm_longmamba.calibration.offline import calibrate
from vllm_longmamba.calibration.sequences import draw_sequences
from vllm_longmamba.calibration.settings import CalibrationSettings

from .harness import EAGER, TRAIN_LENGTH

pytestmark = pytest.mark.engine

TEXT = EXAMPLES / "texts" / "calibration.txt"
EXAMPLE_MODEL = EXAMPLES / "passkey-mamba2-4m"
# The contract of the two implementations.
TOLERANCE = 1e-3


@pytest.mark.parametrize(
    ("family", "clamp_percent"),
    [("mamba1", 20.0), ("mamba2", 5.0), ("example", None)],
)
def test_same_table(family: str, clamp_percent: float | None, tiny_model: Callable[[str], Path]) -> None:
    model = EXAMPLE_MODEL if family == "example" else tiny_model(family)
    train_length = 512 if family == "example" else TRAIN_LENGTH
    settings = CalibrationSettings(
        num_sequences=3,
        train_length=train_length,
        max_length=6 * train_length,
        clamp_percent=clamp_percent,
        seed=11,
        texts=(str(TEXT),),
    )
    table = calibrate(str(model), settings, dtype="float32", **EAGER)
    assert table.metadata.unfiltered_end == (train_length // 2 if clamp_percent is None else 0)

    # The tokenizers of these models are byte-level.
    sequences = draw_sequences([list(TEXT.read_bytes())], train_length, 3, seed=11)
    dts = [{layer: dt.numpy() for layer, dt in reference_dt(model, tokens).items()} for tokens in sequences]
    weights = _read_weights(model)
    assert set(table.layers) == set(dts[0])
    for layer, thresholds in table.layers.items():
        A = -torch.exp(weights[f"backbone.layers.{layer}.mixer.A_log"].double()).numpy()
        of_layer = [dt[layer] for dt in dts]
        retention = independent_calibration.retention(A, of_layer)
        for min_retention in (1e-20, 1e-10, 1e-5, 1e-2, 1e-1):
            np.testing.assert_array_equal(table.is_global(layer, min_retention).numpy(), retention > min_retention)
        assert (thresholds.dt_threshold[0] == -1).all()
        for row in (1, len(table.row_lengths) // 2, len(table.row_lengths) - 1):
            length = int(table.row_lengths[row])
            unclamped = clamp_percent is None
            method = (0.0, True, 0.5) if unclamped else (clamp_percent,)
            expected = independent_calibration.dt_threshold(of_layer, length, *method)
            np.testing.assert_allclose(thresholds.dt_threshold[row].numpy(), expected, rtol=TOLERANCE)
