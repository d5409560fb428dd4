"""An engine without a table makes one: after the model is loaded and warmed up, before it takes requests.

The workers start with thresholds that filter nothing. The calibration sequences then run through vLLM's own scheduler
and executor, so that chunked prefill, block tables, attention, tensor and pipeline parallelism are vLLM's; the
thresholds are written over the empty ones in place, where captured CUDA graphs find them.
"""

import copy
import logging
import time
from pathlib import Path
from typing import Any

from vllm_longmamba.calibration.settings import CalibrationSettings, from_config
from vllm_longmamba.checkpoint.trusted_file import UntrustedFileError, check_trusted, make_private_folder
from vllm_longmamba.options import options_from_config
from vllm_longmamba.tables import TableError, ThresholdTable, save_bytes, table_from_bytes, table_to_bytes

logger = logging.getLogger("vllm.longmamba")


def provide_table(executor: Any, vllm_config: Any, kv_cache_config: Any) -> ThresholdTable | None:
    """Give the workers of an engine the table that the front end did not find.

    `longmamba tune` may ask for several tables; the engine goes on with the first.

    Args:
        executor: vLLM's executor, its model loaded and its cache allocated.
        vllm_config: the engine's configuration.
        kv_cache_config: the scheduler's view of the cache.

    Returns:
        The table, None where the front end found one or no prompt can be long enough to be filtered.

    Raises:
        ValueError: the text does not have enough tokens.
    """
    from vllm_longmamba.calibration.worker import use_table

    to_make = from_config(vllm_config.additional_config)
    if not to_make:
        return None
    max_model_len = vllm_config.model_config.max_model_len
    if not to_make[0].can_filter(max_model_len):
        warn_of_short_prompts(to_make[0], max_model_len)
        return None
    min_retention = options_from_config(vllm_config.additional_config).min_retention
    made = []
    for settings in to_make:
        stored = read_stored(settings)
        if stored is not None:
            logger.info("LongMamba: thresholds from %s, made at an earlier start", settings.store)
        made.append(stored or _make_table(settings, min_retention, executor, vllm_config, kv_cache_config))
    content, table = made[0]
    executor.collective_rpc(use_table, args=(content,))
    return table


def warn_of_short_prompts(settings: CalibrationSettings, max_model_len: int) -> None:
    """Say that an engine serves the plain model."""
    logger.warning(
        "LongMamba filters nothing here: the model's training length of %d tokens covers prompts of up to "
        "max_model_len %d tokens; the plain model is served. Give a larger --max-model-len, or the right training "
        """length, --additional-config '{"longmamba": {"train_length": N}}'""",
        settings.train_length,
        max_model_len,
    )


def read_stored(settings: CalibrationSettings) -> tuple[bytes, ThresholdTable] | None:
    """The table that an earlier start has stored, and what its file holds; None where there is none to be used."""
    if settings.store is None:
        return None
    path = Path(settings.store)
    try:
        check_trusted(path)
        content = path.read_bytes()
        table = table_from_bytes(content, settings.store)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, TableError, UntrustedFileError) as error:
        logger.warning("LongMamba: the stored table cannot be used, calibrating again: %s", error)
        return None
    return (content, table) if table.metadata.weights_fingerprint == settings.weights_fingerprint else None


def _make_table(
    settings: CalibrationSettings, min_retention: float | None, *engine: Any
) -> tuple[bytes, ThresholdTable]:
    started = time.monotonic()
    table = _calibrate(settings, *engine)
    content = table_to_bytes(table)
    is_stored = _store(settings, content)
    logger.info(
        "LongMamba: calibrated in %.1f s on %d sequences of the training length of %d tokens, %d of %d channels are "
        "global; %s",
        time.monotonic() - started,
        settings.num_sequences,
        settings.train_length,
        table.count_global(min_retention),
        sum(len(layer.retention) for layer in table.layers.values()),
        f"stored in {settings.store}" if is_stored else "not stored",
    )
    return content, table


def _calibrate(settings: CalibrationSettings, executor: Any, vllm_config: Any, kv_cache_config: Any) -> ThresholdTable:
    from vllm_longmamba.calibration.sequences import draw_sequences
    from vllm_longmamba.calibration.text import read_corpus
    from vllm_longmamba.calibration.worker import finish_calibration, merge_workers, start_calibration

    corpus = read_corpus([Path(path) for path in settings.texts], settings.text_column)
    tokenizer = _tokenizer(vllm_config.model_config)
    texts = [tokenizer.encode(text, add_special_tokens=False) for text in corpus.texts]
    metadata = settings.metadata()
    sequences = draw_sequences(texts, metadata.train_length, settings.num_sequences, settings.seed)
    executor.collective_rpc(start_calibration, args=(settings,))
    run = _Runner(executor, vllm_config, kv_cache_config)
    for sequence in sequences:
        run(sequence)
    run.end()
    layers = merge_workers(executor.collective_rpc(finish_calibration))
    return ThresholdTable(metadata=metadata, row_lengths=settings.row_lengths, layers=layers)


def _tokenizer(model_config: Any) -> Any:
    from vllm.tokenizers import cached_tokenizer_from_config

    # --skip-tokenizer-init is about requests; calibration reads text.
    config = copy.copy(model_config)
    config.skip_tokenizer_init = False
    try:
        return cached_tokenizer_from_config(config)
    except Exception as error:
        raise ValueError(
            f"calibration needs a tokenizer, but that of {config.tokenizer!r} cannot be loaded ({error}); name one "
            f"with --tokenizer, or make a table first with `longmamba calibrate {config.model} --tokenizer NAME`"
        ) from error


class _Runner:
    """Runs sequences through the model, one after the other, by a scheduler that is thrown away afterwards.

    The engine's own scheduler, which does not exist yet, keeps its statistics, its prefix cache and its events.
    """

    def __init__(self, executor: Any, vllm_config: Any, kv_cache_config: Any) -> None:
        from vllm import SamplingParams
        from vllm.utils.hashing import get_hash_fn_by_name
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash, resolve_kv_cache_block_sizes
        from vllm.v1.structured_output import StructuredOutputManager

        self._executor = executor
        self._number = 0
        config = copy.copy(vllm_config)
        config.kv_events_config = None
        block_size, hash_block_size = resolve_kv_cache_block_sizes(kv_cache_config, config)
        hash_function = get_hash_fn_by_name(config.cache_config.prefix_caching_hash_algo)
        init_none_hash(hash_function)
        self._scheduler = config.scheduler_config.get_scheduler_cls()(
            vllm_config=config,
            kv_cache_config=kv_cache_config,
            structured_output_manager=StructuredOutputManager(config),
            block_size=block_size,
            hash_block_size=hash_block_size,
        )
        self._params = SamplingParams(max_tokens=1, temperature=0.0, skip_reading_prefix_cache=True)
        self._hasher = get_request_block_hasher(hash_block_size, hash_function)

    def __call__(self, sequence: list[int]) -> None:
        """Run one sequence to its end."""
        from vllm.v1.request import Request

        # One token more than is recorded: a last chunk of one token would be a decode step, which records nothing.
        prompt = [*sequence, sequence[-1]]
        name = f"longmamba-calibration-{self._number}"
        self._scheduler.add_request(Request(name, prompt, self._params, None, block_hasher=self._hasher))
        self._number += 1
        while self._scheduler.has_requests():
            self._step()

    def _step(self) -> None:
        output = self._scheduler.schedule()
        if output.total_num_scheduled_tokens == 0 and self._scheduler.has_unfinished_requests():
            raise RuntimeError(
                "vllm_longmamba: vLLM's scheduler does not run the calibration sequences; please report it"
            )
        result = self._executor.execute_model(output)
        if result is None:
            result = self._executor.sample_tokens(None)
        self._scheduler.update_from_output(output, result)

    def end(self) -> None:
        """Nothing may be run afterwards."""
        self._scheduler.shutdown()


def _store(settings: CalibrationSettings, content: bytes) -> bool:
    if settings.store is None:
        return False
    try:
        make_private_folder(Path(settings.store).parent)
        save_bytes(content, settings.store)
    except OSError as error:
        logger.warning("LongMamba: the table cannot be stored, the next start will calibrate again: %s", error)
        return False
    return True
