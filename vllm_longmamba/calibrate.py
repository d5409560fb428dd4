"""Makes a model's threshold table: real text through the real vLLM model, without the filter."""

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from vllm_longmamba import __version__
from vllm_longmamba.architectures import MODEL_IMPL, is_mamba1
from vllm_longmamba.model_length import DEFAULT_MAX_MODEL_LEN, train_length
from vllm_longmamba.options import KEY, LongMambaOptions
from vllm_longmamba.tables import TableMetadata, ThresholdTable, default_row_lengths

_EXTENSION = "vllm_longmamba.calibration_worker.CalibrationWorkerExtension"


@dataclass(frozen=True)
class CalibrationSettings:
    """How a table is made.

    Attributes:
        num_sequences: calibration sequences, each of the training length; the paper takes 5.
        clamp_percent: share of the largest dt's that are clamped (the paper's C). By default 20 for Mamba-1 and 5 for
            Mamba-2 layers, the paper's choice for Mamba-1.4B and Mamba2-1.3B.
        min_retention: what the table proposes as retention above which a channel is global (the paper's theta).
        train_length: the paper's L; by default what is known of the model.
        max_length: the longest prompt the table is made for, in tokens.
        seed: chooses the sequences.
    """

    num_sequences: int = 5
    clamp_percent: float | None = None
    min_retention: float = 1e-2
    train_length: int | None = None
    max_length: int = DEFAULT_MAX_MODEL_LEN
    seed: int = 0


def calibrate(
    model: str,
    texts: list[Path],
    settings: CalibrationSettings | None = None,
    *,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    **engine_args: Any,
) -> ThresholdTable:
    """Calibrate a model on text.

    Args:
        model: name or folder, as for `vllm serve`.
        texts: plain text files (UTF-8).
        settings: see `CalibrationSettings`.
        progress: wraps the iteration over the sequences, for a progress bar.
        engine_args: further arguments of vLLM's `LLM`, such as `tensor_parallel_size`.

    Returns:
        The table, not yet saved.

    Raises:
        ValueError: too little text, or an unknown training length.
    """
    from vllm import LLM, SamplingParams

    settings = settings or CalibrationSettings()
    corpus = "".join(path.read_text(encoding="utf-8") for path in texts)
    length = _train_length(model, settings, engine_args)
    llm = LLM(
        model,
        model_impl=MODEL_IMPL,
        additional_config={KEY: {"filter": False}},
        worker_extension_cls=_EXTENSION,
        max_model_len=length + 1,
        max_num_batched_tokens=length + 1,
        max_num_seqs=1,
        enable_prefix_caching=False,
        enforce_eager=True,
        **engine_args,
    )
    config = llm.llm_engine.vllm_config
    tokens = llm.get_tokenizer().encode(corpus, add_special_tokens=False)
    sequences = choose_sequences(tokens, length, settings.num_sequences, settings.seed)
    row_lengths = default_row_lengths(length, settings.max_length)
    clamp_percent = settings.clamp_percent if settings.clamp_percent is not None else _default_clamp(config)
    llm.collective_rpc("longmamba_start_calibration", args=(length, row_lengths.tolist(), clamp_percent))
    once = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
    for sequence in progress(sequences):
        llm.generate({"prompt_token_ids": sequence}, once, use_tqdm=False)
    metadata = TableMetadata(
        model_id=Path(model).name if Path(model).is_dir() else model,
        weights_fingerprint=_fingerprint(config),
        train_length=length,
        corpus=", ".join(f"{path.name} (blake3 {blake3(path.read_bytes()).hexdigest()[:16]})" for path in texts),
        clamp_percent=clamp_percent,
        min_retention=settings.min_retention,
        num_sequences=settings.num_sequences,
        seed=settings.seed,
        tool_version=f"vllm_longmamba {__version__}",
    )
    return ThresholdTable(metadata=metadata, row_lengths=row_lengths, layers=_collect_layers(llm))


def choose_sequences(tokens: list[int], length: int, number: int, seed: int) -> list[list[int]]:
    """Choose calibration sequences: windows of the text that do not overlap, drawn without replacement.

    Args:
        tokens: the text.
        length: tokens of a sequence.
        number: how many sequences.
        seed: the same seed gives the same sequences.

    Raises:
        ValueError: the text has fewer windows than asked for.
    """
    windows = len(tokens) // length
    if windows < number:
        raise ValueError(
            f"calibration takes {number} sequences of {length} tokens, {number * length} in all, but the text has only "
            f"{len(tokens)} tokens; give more text (--text may be repeated) or fewer --sequences"
        )
    chosen = np.random.default_rng(seed).choice(windows, size=number, replace=False)
    return [tokens[start * length : (start + 1) * length] for start in chosen.tolist()]


def _train_length(model: str, settings: CalibrationSettings, engine_args: dict[str, Any]) -> int:
    if settings.train_length is not None:
        return settings.train_length
    from vllm.transformers_utils.config import get_config

    from vllm_longmamba.plugin import register

    register()
    config = get_config(model, engine_args.get("trust_remote_code", False), engine_args.get("revision"))
    return train_length(config.get_text_config(), LongMambaOptions())


def _default_clamp(vllm_config: Any) -> float:
    return 20.0 if is_mamba1(vllm_config.model_config.architecture) else 5.0


def _fingerprint(vllm_config: Any) -> str:
    from vllm_longmamba.table_lookup import locate_weights

    return locate_weights(vllm_config.model_config, vllm_config.load_config).fingerprint


def _collect_layers(llm: Any) -> Any:
    from vllm_longmamba.calibration_worker import merge_shards

    with tempfile.TemporaryDirectory(prefix="longmamba-") as folder:
        llm.collective_rpc("longmamba_save_shard", args=(folder,))
        return merge_shards(Path(folder))
