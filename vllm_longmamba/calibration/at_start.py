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

from vllm_longmamba.calibration.plan import CalibrationPlan, plan_from_config
from vllm_longmamba.checkpoint.fingerprint import DUMMY
from vllm_longmamba.options import options_from_config
from vllm_longmamba.tables import (
    TableError,
    ThresholdTable,
    save_bytes,
    table_from_bytes,
    table_to_bytes,
)

logger = logging.getLogger("vllm.longmamba")


def calibration_obstacle(vllm_config: Any) -> str | None:
    """Why an engine cannot calibrate itself, in words; None where it can."""
    parallel = vllm_config.parallel_config
    obstacles = {
        "a pooling model generates nothing": vllm_config.model_config.runner_type == "pooling",
        "--kv-transfer-config would hand the calibration sequences on": vllm_config.kv_transfer_config is not None,
        "an external launcher has an engine for each rank": (
            parallel.distributed_executor_backend == "external_launcher"
        ),
        # One of them may find a table that another has not.
        "the engines of a data-parallel mixture of experts step together": (
            parallel.data_parallel_size > 1 and vllm_config.model_config.is_moe
        ),
    }
    return next((obstacle for obstacle, applies in obstacles.items() if applies), None)


def provide_table(executor: Any, vllm_config: Any, kv_cache_config: Any) -> ThresholdTable | None:
    """Give the workers of an engine the table that the front end did not find.

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

    plan = plan_from_config(vllm_config.additional_config)
    if plan is None or not plan.can_filter(vllm_config.model_config.max_model_len):
        return None
    stored = _stored_table(plan)
    if stored is not None:
        content, table = stored
    else:
        started = time.monotonic()
        table = _calibrate(plan, executor, vllm_config, kv_cache_config)
        content = table_to_bytes(table)
        is_stored = _store(plan, content)
        min_retention = options_from_config(vllm_config.additional_config).min_retention
        global_channels = table.count_global(min_retention)
        logger.info(
            "LongMamba: calibrated in %.1f s on %d sequences of the training length of %d tokens, %d of %d channels "
            "are global; %s",
            time.monotonic() - started,
            plan.num_sequences,
            plan.train_length,
            global_channels,
            sum(len(layer.retention) for layer in table.layers.values()),
            f"stored in {plan.store}" if is_stored else "not stored",
        )
    executor.collective_rpc(use_table, args=(content,))
    return table


def _stored_table(plan: CalibrationPlan) -> tuple[bytes, ThresholdTable] | None:
    """The table that an earlier start has stored, and what its file holds."""
    if plan.store is None:
        return None
    try:
        content = Path(plan.store).read_bytes()
        table = table_from_bytes(content, plan.store)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, TableError) as error:
        logger.warning("LongMamba: the stored table cannot be used, calibrating again: %s", error)
        return None
    if table.metadata.weights_fingerprint != plan.weights_fingerprint:
        return None
    logger.info("LongMamba: thresholds from %s, made at an earlier start", plan.store)
    return content, table


def _calibrate(plan: CalibrationPlan, executor: Any, vllm_config: Any, kv_cache_config: Any) -> ThresholdTable:
    from vllm_longmamba.calibration.sequences import draw_sequences, tokenize
    from vllm_longmamba.calibration.text import read_corpus
    from vllm_longmamba.calibration.worker import finish_calibration, merge_workers, start_calibration

    corpus = read_corpus([Path(path) for path in plan.texts])
    texts = tokenize(_tokenizer(vllm_config.model_config), corpus)
    sequences = draw_sequences(texts, plan.train_length, plan.num_sequences, plan.seed)
    metadata = plan.metadata(sum(map(len, texts)))
    is_dummy = plan.weights_fingerprint == DUMMY
    settings = (
        plan.train_length,
        plan.row_lengths.tolist(),
        plan.clamp_percent,
        metadata.combine,
        metadata.budget,
        metadata.channel_budgets,
        is_dummy,
    )
    executor.collective_rpc(start_calibration, args=settings)
    run = _Runner(executor, vllm_config, kv_cache_config)
    for sequence in sequences:
        run(sequence)
    if plan.measured_lengths:
        _close_loop(plan, executor, texts, run)
    run.end()
    layers = merge_workers(executor.collective_rpc(finish_calibration, args=(len(sequences),)))
    return ThresholdTable(metadata=metadata, row_lengths=plan.row_lengths, layers=layers)


def _close_loop(plan: CalibrationPlan, executor: Any, texts: list[list[int]], run: "_Runner") -> None:
    from vllm_longmamba.calibration.closed_loop import close_loop, closed_loop_sequences, start_length

    lengths = list(plan.measured_lengths)
    if lengths[-1] + 2 > run.max_model_len:
        raise ValueError(
            f"closed-loop calibration needs a max_model_len of {lengths[-1] + 2} at the start, but the cache has "
            f"room for {run.max_model_len} tokens; give --max-model-len {run.max_model_len}"
        )
    executor.collective_rpc(close_loop, args=(plan.num_sequences, plan.min_retention, lengths, plan.combine))
    for sequence in closed_loop_sequences(texts, lengths, plan.num_sequences, plan.seed):
        executor.collective_rpc(start_length, args=(len(sequence),))
        run(sequence)


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

        self.max_model_len: int = vllm_config.model_config.max_model_len
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
            _step(self._executor, self._scheduler)

    def end(self) -> None:
        """Nothing may be run afterwards."""
        self._scheduler.shutdown()


def _step(executor: Any, scheduler: Any) -> None:
    output = scheduler.schedule()
    if output.total_num_scheduled_tokens == 0 and scheduler.has_unfinished_requests():
        raise RuntimeError("vllm_longmamba: vLLM's scheduler does not run the calibration sequences; please report it")
    result = executor.execute_model(output)
    if result is None:
        result = executor.sample_tokens(None)
    scheduler.update_from_output(output, result)


def _store(plan: CalibrationPlan, content: bytes) -> bool:
    if plan.store is None:
        return False
    try:
        Path(plan.store).parent.mkdir(parents=True, exist_ok=True)
        save_bytes(content, plan.store)
    except OSError as error:
        logger.warning("LongMamba: the table cannot be stored, the next start will calibrate again: %s", error)
        return False
    return True
