"""A plan of a calibration at the start, for tests that run none."""

from vllm_longmamba.calibration.plan import CalibrationPlan

PAPER_PLAN = CalibrationPlan(
    model_id="org/model",
    weights_fingerprint="f" * 64,
    dtype="float32",
    quantization=None,
    train_length=96,
    max_length=1000,
    num_sequences=5,
    clamp_percent=5.0,
    min_retention=1e-2,
    seed=0,
    texts=(),
    corpus="a text (blake3 00)",
)
