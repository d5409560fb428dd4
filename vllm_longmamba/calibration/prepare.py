"""What an engine's front end settles about a calibration, before any weight is loaded."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm_longmamba.calibration.settings import CalibrationSettings
from vllm_longmamba.calibration.text import read_corpus
from vllm_longmamba.checkpoint.fingerprint import DUMMY
from vllm_longmamba.checkpoint.table_lookup import cache_folder
from vllm_longmamba.checkpoint.train_length import DEFAULT_MAX_MODEL_LEN, train_length
from vllm_longmamba.options import expand_home, options_from_config


def settings_of_engine(vllm_config: Any, options: Any, fingerprint: str) -> CalibrationSettings:
    """How an engine calibrates itself that found no table.

    Args:
        vllm_config: vLLM's configuration.
        options: the engine's `LongMambaOptions`.
        fingerprint: of the model's weights.

    Raises:
        ValueError: as `complete`.
    """
    settings = CalibrationSettings(
        method=options.calibration_method,
        train_length=train_length(vllm_config.model_config.hf_text_config, options),
        max_length=max(vllm_config.model_config.max_model_len, DEFAULT_MAX_MODEL_LEN),
        unfiltered_end=options.unfiltered_end,
        texts=(options.calibration_text,) if options.calibration_text else (),
    )
    if not settings.can_filter(vllm_config.model_config.max_model_len):
        return settings
    settings = complete(settings, vllm_config, fingerprint)
    if fingerprint == DUMMY:
        return settings
    return replace(settings, store=str(cache_folder() / f"{fingerprint[:32]}-{settings.key()}.safetensors"))


def complete(settings: CalibrationSettings, vllm_config: Any, fingerprint: str) -> CalibrationSettings:
    """Fill in what the model, its engine and the text decide.

    Args:
        settings: with the training length.
        vllm_config: vLLM's configuration.
        fingerprint: of the model's weights.

    Raises:
        ValueError: an unreadable or too short text.
    """
    model_config = vllm_config.model_config
    try:
        texts = [expand_home(path, "calibration_text").absolute() for path in settings.texts]
        corpus = read_corpus(texts, settings.text_column)
    except OSError as error:
        raise ValueError(
            f"the text to calibrate on (option calibration_text, or --text) cannot be read: {error}; name another file"
        ) from error
    model = model_config.model
    if settings.unfiltered_end is None and options_from_config(vllm_config.additional_config).filter_generated:
        # Generated tokens follow the end of the prompt, so it cannot be left out where they are filtered.
        settings = replace(settings, unfiltered_end=0)
    settings = replace(
        settings,
        clamp_percent=settings.clamp(model_config.architecture),
        min_retention=settings.theta,
        budget=settings.budget_before_end(),
        unfiltered_end=settings.end(),
        texts=tuple(map(str, texts)),
        model_id=Path(model).resolve().name if Path(model).is_dir() else model,
        weights_fingerprint=fingerprint,
        dtype=str(model_config.dtype).removeprefix("torch."),
        quantization=model_config.quantization,
        corpus=corpus.name,
    )
    _check_length(corpus.characters, settings)
    return settings


def calibration_obstacle(vllm_config: Any) -> str | None:
    """Why an engine cannot calibrate itself, in words; None where it can."""
    parallel = vllm_config.parallel_config
    obstacles = {
        "a pooling model generates nothing": vllm_config.model_config.runner_type == "pooling",
        "--kv-transfer-config or --kv-offloading-size would hand the calibration sequences on": (
            vllm_config.kv_transfer_config is not None
        ),
        "an external launcher has an engine for each rank": (
            parallel.distributed_executor_backend == "external_launcher"
        ),
        # One of them may find a table that another has not.
        "the engines of a data-parallel mixture of experts step together": (
            parallel.data_parallel_size > 1 and vllm_config.model_config.is_moe
        ),
    }
    return next((obstacle for obstacle, applies in obstacles.items() if applies), None)


def _check_length(characters: int, settings: CalibrationSettings) -> None:
    # A token has at least one character, so this much is known before the text is tokenized.
    if characters < settings.num_sequences * (settings.train_length or 0):
        raise ValueError(
            f"calibration takes {settings.num_sequences} sequences of {settings.train_length} tokens, but "
            f"{settings.corpus} has only {characters} characters; give more text as calibration_text, "
            """--additional-config '{"longmamba": {"calibration_text": "FILE"}}', or make a table with """
            f"`longmamba calibrate {settings.model_id} --text FILE`"
        )
