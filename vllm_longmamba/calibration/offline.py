"""Makes a model's threshold table: real text through the real vLLM model, without the filter."""

import tempfile
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm_longmamba import __version__
from vllm_longmamba.architectures import MODEL_IMPL
from vllm_longmamba.calibration.closed_loop import closed_loop_sequences
from vllm_longmamba.calibration.sequences import draw_sequences, model_name, tokenize
from vllm_longmamba.calibration.settings import CalibrationSettings
from vllm_longmamba.calibration.text import read_corpus
from vllm_longmamba.checkpoint.train_length import train_length
from vllm_longmamba.options import KEY, LongMambaOptions
from vllm_longmamba.tables import (
    CLOSED_LOOP,
    MEAN,
    UNCLAMPED,
    ClosedLoop,
    LayerThresholds,
    TableMetadata,
    ThresholdTable,
    default_row_lengths,
    measured_lengths,
    read_channel_budgets,
)

# Share of a GPU's memory for vLLM where long sequences are measured.
_MEMORY_BESIDE_DT = 0.7
_EXTENSION = "vllm_longmamba.calibration.worker.CalibrationWorkerExtension"


def calibrate(
    model: str,
    texts: list[Path] | None = None,
    settings: CalibrationSettings | None = None,
    *,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    text_column: str = "text",
    **engine_args: Any,
) -> ThresholdTable:
    """Calibrate a model on text.

    Args:
        model: name or folder, as for `vllm serve`.
        texts: files of plain text (UTF-8), .jsonl or .parquet; by default the sample that comes with the package.
        settings: see `CalibrationSettings`.
        progress: wraps the iteration over the sequences, for a progress bar.
        text_column: the field or column of .jsonl and .parquet files that holds the text.
        engine_args: further arguments of vLLM's `LLM`, such as `tensor_parallel_size`.

    Returns:
        The table, not yet saved.

    Raises:
        ValueError: too little text, or an unknown training length.
    """
    arguments = {"progress": progress, "text_column": text_column, **engine_args}
    return next(calibrate_groups(1, model, texts, settings, **arguments))


def calibrate_groups(
    groups: int,
    model: str,
    texts: list[Path] | None = None,
    settings: CalibrationSettings | None = None,
    *,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    text_column: str = "text",
    **engine_args: Any,
) -> Iterator[ThresholdTable]:
    """Calibrate a model several times, each time on other sequences, to see how far the tables agree.

    Args:
        groups: how many tables; their seeds count up from that of the settings.
        model, texts, settings, progress, text_column, engine_args: as for `calibrate`.

    Yields:
        The tables; the first is the one that `calibrate` makes.

    Raises:
        ValueError: as for `calibrate`.
    """
    from vllm import LLM

    settings = settings or CalibrationSettings()
    corpus = read_corpus(texts or [], text_column)
    length = find_train_length(model, settings, engine_args)
    row_lengths = default_row_lengths(length, settings.max_length)
    lengths = measured_lengths(row_lengths, settings.measure_to) if settings.method == CLOSED_LOOP else []
    longest = max(length, *lengths, 0)
    if lengths:
        # The measured dt lie beside the memory that vLLM takes for itself.
        engine_args = {"gpu_memory_utilization": _MEMORY_BESIDE_DT, **engine_args}
    llm = LLM(
        model,
        model_impl=MODEL_IMPL,
        additional_config={KEY: {"filter": False}},
        worker_extension_cls=_EXTENSION,
        # A sequence runs in one step.
        max_model_len=longest + 1,
        max_num_batched_tokens=longest + 1,
        max_num_seqs=1,
        enable_prefix_caching=False,
        enforce_eager=True,
        **engine_args,
    )
    config = llm.llm_engine.vllm_config
    texts_in_tokens = tokenize(llm.get_tokenizer(), corpus)
    clamp_percent = settings.clamp(config.model_config.architecture)
    metadata = TableMetadata(
        model_id=model_name(model),
        weights_fingerprint=_fingerprint(config),
        train_length=length,
        corpus=corpus.name,
        clamp_percent=clamp_percent,
        min_retention=settings.theta,
        num_sequences=settings.num_sequences,
        seed=settings.seed,
        tool_version=f"vllm_longmamba {__version__}",
        method=settings.method,
        combine=settings.way_to_combine if settings.method == UNCLAMPED else MEAN,
        closed_loop=_closed_loop(settings, lengths, texts_in_tokens),
        budget=settings.budget if settings.method == UNCLAMPED else 1.0,
        channel_budgets=settings.channel_budgets,
        unfiltered_end=settings.unfiltered_end,
    )
    for seed in range(settings.seed, settings.seed + groups):
        sequences = draw_sequences(texts_in_tokens, length, settings.num_sequences, seed)
        sequences += closed_loop_sequences(texts_in_tokens, lengths, settings.num_sequences, seed)
        arguments = (
            length,
            row_lengths.tolist(),
            clamp_percent,
            metadata.combine,
            metadata.budget,
            metadata.channel_budgets,
        )
        of_workers = llm.collective_rpc("longmamba_start_calibration", args=arguments)
        _check_channels(settings.channel_budgets, dict(ChainMap(*of_workers)))
        layers = _run(llm, progress(sequences), settings, lengths)
        yield ThresholdTable(metadata=replace(metadata, seed=seed), row_lengths=row_lengths, layers=layers)


def _check_channels(channel_budgets: Iterable[str], channels: dict[int, int]) -> None:
    for layer, channel in read_channel_budgets(channel_budgets):
        if channel >= channels.get(layer, 0):
            has = f"{channels[layer]} channels in layer {layer}" if layer in channels else f"layers {sorted(channels)}"
            raise ValueError(f"channel_budgets: this model has no channel {layer}.{channel}; it has {has}")


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


def _fingerprint(vllm_config: Any) -> str:
    from vllm_longmamba.checkpoint.table_lookup import locate_weights

    return locate_weights(vllm_config.model_config, vllm_config.load_config).fingerprint


def _closed_loop(settings: CalibrationSettings, lengths: list[int], texts: list[list[int]]) -> ClosedLoop | None:
    if settings.method != CLOSED_LOOP:
        return None
    tokens = sum(map(len, texts))
    return ClosedLoop(
        combine=settings.way_to_combine, lengths=tuple(lengths), text_tokens=tokens, budget=settings.budget
    )


def _run(
    llm: Any, sequences: Iterable[list[int]], settings: CalibrationSettings, lengths: list[int]
) -> dict[int, LayerThresholds]:
    """Run sequences, those of the training length first, then those of `lengths`."""
    from vllm import SamplingParams

    from vllm_longmamba.calibration.worker import merge_shards

    once = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
    number = settings.num_sequences
    for place, sequence in enumerate(sequences):
        if place == number:
            arguments = (number, settings.theta, lengths, settings.way_to_combine, settings.budget)
            llm.collective_rpc("longmamba_close_loop", args=arguments)
        if place >= number:
            llm.collective_rpc("longmamba_start_length", args=(len(sequence),))
        llm.generate({"prompt_token_ids": sequence}, once, use_tqdm=False)
    with tempfile.TemporaryDirectory(prefix="longmamba-") as folder:
        llm.collective_rpc("longmamba_save_shard", args=(folder, number))
        return merge_shards(Path(folder))
