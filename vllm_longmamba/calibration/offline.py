"""Makes a model's threshold tables without serving it: an engine that calibrates itself at its start, as any other."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm_longmamba.architectures import MODEL_IMPL
from vllm_longmamba.calibration.settings import CalibrationSettings, to_config
from vllm_longmamba.checkpoint.train_length import train_length
from vllm_longmamba.options import LongMambaOptions
from vllm_longmamba.tables import ThresholdTable, load_table

# vLLM's own patience of 5 s ends in warnings about killed processes.
_END_TIMEOUT_S = 60.0


def calibrate(model: str, settings: CalibrationSettings | None = None, **engine_args: Any) -> ThresholdTable:
    """Calibrate a model on text.

    Args:
        model: name or folder, as for `vllm serve`.
        settings: see `CalibrationSettings`.
        engine_args: further arguments of vLLM's `LLM`, such as `tensor_parallel_size`. The table is that of an engine
            with these arguments that calibrates itself at its start.

    Returns:
        The table, not yet saved.

    Raises:
        ValueError: too little text, or an unknown training length.
        RuntimeError: the engine, in a process of its own, did not start; it has said why.
    """
    from vllm import LLM

    settings = settings or CalibrationSettings()
    with tempfile.TemporaryDirectory(prefix="longmamba-") as folder:
        path = Path(folder) / "table.safetensors"
        length = find_train_length(model, settings, engine_args)
        settings = replace(settings, train_length=length, store=str(path))
        config = {**engine_args.pop("additional_config", {}), **to_config([settings])}
        # An engine whose prompts are all too short to be filtered would make no table. A token follows each sequence,
        # and another one is generated.
        longest = int(settings.row_lengths[1]) + 2
        own = {"model_impl": MODEL_IMPL, "max_model_len": longest, "max_num_seqs": 1}
        llm = LLM(model, additional_config=config, **{**own, **engine_args})
        llm.llm_engine.engine_core.shutdown(timeout=_END_TIMEOUT_S)
        return load_table(path)


def find_train_length(model: str, settings: CalibrationSettings, engine_args: dict[str, Any]) -> int:
    """L: what the settings say, or what is known of the model.

    Raises:
        ValueError: neither says it.
    """
    if settings.train_length is not None:
        return settings.train_length
    from vllm.plugins import load_general_plugins
    from vllm.transformers_utils.config import get_config

    # Ours makes original checkpoints readable.
    load_general_plugins()
    config = get_config(model, engine_args.get("trust_remote_code", False), engine_args.get("revision"))
    return train_length(config.get_text_config(), LongMambaOptions())
