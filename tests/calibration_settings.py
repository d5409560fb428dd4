"""Settings of a calibration as an engine's front end completes them, for tests that run none."""

from vllm_longmamba.calibration.settings import CalibrationSettings

PAPER_SETTINGS = CalibrationSettings(
    method="paper",
    model_id="org/model",
    weights_fingerprint="f" * 64,
    dtype="float32",
    train_length=96,
    max_length=1000,
    clamp_percent=5.0,
    min_retention=1e-2,
    corpus="a text (blake3 00)",
)
