"""Many engines on a Ray cluster: Ray Data with vLLM's engine processor (`ray.data.llm`), fed by this job.

Prompts go through a queue into a dataset of one long read task; its rows pass the engine replicas and come back to
this process. So the job decides what to ask next, as with any other backend, and writes the rows itself.
"""

import asyncio
import contextlib
import itertools
import logging
import math
import os
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_longmamba.summarize.backends import Sampling
from vllm_longmamba.summarize.engine import engine_args, kept_full, model_config_tokenizer
from vllm_longmamba.summarize.prompts import Prompt
from vllm_longmamba.summarize.ray_plugin import plugin_modules, staging_folder
from vllm_longmamba.summarize.records import Completion, JobStoppedError, RecordError
from vllm_longmamba.summarize.watchdog import Watchdog

LOCAL = "local"
_DEFAULT_MAX_NUM_SEQS = 256
_END_TIMEOUT_S = 30.0
_KEY = "longmamba_request"
# Variables of the driver that decide how an engine runs; never a secret, which Ray would log.
_PASSED_VARIABLES = ("VLLM_", "HF_", "OMP_", "NUMBA_", "TRITON_")
_SECRETS = ("TOKEN", "KEY")


@dataclass(frozen=True)
class RayOptions:
    """Where the replicas run.

    Attributes:
        address: of the cluster; "auto" is the one that runs on this machine, "local" starts one on this machine.
        replicas: engines.
        resources: of one worker of a replica; None takes a GPU where the cluster has any, a CPU elsewhere.
        timeout_s: longest time for one answer.
    """

    address: str
    replicas: int = 1
    resources: dict[str, float] | None = None
    timeout_s: float = 3600.0


class RayBackend:
    """Engine replicas on a Ray cluster.

    Args:
        arguments: of vLLM's `AsyncEngineArgs`.
        sampling: how answers are sampled.
        options: where the replicas run.
        concurrency: prompts under way at a time on all replicas; None takes what keeps them full.

    Raises:
        JobStoppedError: the cluster cannot be reached, or has not the resources.
    """

    def __init__(
        self, arguments: dict[str, Any], sampling: Sampling, options: RayOptions, concurrency: int | None = None
    ) -> None:
        from ray.util.queue import Queue

        model_config = engine_args(arguments).create_model_config()
        self.chat = False
        self.tokenizer = model_config_tokenizer(model_config)
        self.max_model_len: int | None = model_config.max_model_len
        running = int(arguments.get("max_num_seqs") or _DEFAULT_MAX_NUM_SEQS)
        each = math.ceil(concurrency / options.replicas) if concurrency else kept_full(running)
        self.concurrency = concurrency or each * options.replicas
        self._end_ids = _end_token_ids(self.tokenizer)
        self._sampling = sampling
        self._timeout_s = options.timeout_s
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._ids = itertools.count()
        self._loop = asyncio.get_running_loop()
        self._failure: JobStoppedError | None = None
        # Never stopped: it waits for the end of this process, and ends what Ray leaves of a cluster on this machine.
        self._watchdog = Watchdog()
        self._staging = staging_folder()
        try:
            runtime_env = {"py_modules": plugin_modules(Path(self._staging.name)), "env_vars": _passed_variables()}
            _connect(options, runtime_env)
            resources = options.resources or _worker_resources()
            self._queue = Queue(actor_options={"num_cpus": 0})
            self._dataset = _dataset(arguments, options, resources, each, runtime_env, self._queue)
        except BaseException:
            self._disconnect()
            raise
        self._receiver = threading.Thread(target=self._receive, name="ray-results", daemon=True)
        self._receiver.start()

    async def complete(self, prompt: Prompt) -> Completion:
        """Answer one prompt; see `Backend`."""
        if self._failure is not None:
            raise self._failure
        number = next(self._ids)
        future = self._waiting[number] = self._loop.create_future()
        try:
            await self._queue.put_async(
                {_KEY: number, "tokenized_prompt": prompt.token_ids, "sampling_params": self._parameters()}
            )
            row = await asyncio.wait_for(future, self._timeout_s)
        except TimeoutError:
            # A node that went away may have taken the prompt with it.
            raise JobStoppedError(f"Ray gave no answer in {self._timeout_s:g} s (--timeout)") from None
        finally:
            self._waiting.pop(number, None)
        if row["__inference_error__"]:
            raise RecordError("refused", row["__inference_error__"])
        tokens = [int(token) for token in row["generated_tokens"]]
        # The processor does not hand the reason on.
        cut = len(tokens) >= self._sampling.max_tokens and tokens[-1] not in self._end_ids
        return Completion(row["generated_text"], int(row["num_input_tokens"]), len(tokens), "length" if cut else "stop")

    async def close(self) -> None:
        """End the replicas, and the cluster if this job started it."""
        try:
            if self._failure is None:
                await self._queue.put_async(None)
                await asyncio.to_thread(self._receiver.join, _END_TIMEOUT_S)
        finally:
            self._disconnect()

    def _disconnect(self) -> None:
        import ray

        ray.shutdown()
        self._staging.cleanup()

    def _parameters(self) -> dict[str, Any]:
        parameters = asdict(self._sampling) | {"stop": list(self._sampling.stop)}
        if self._sampling.temperature == 0:
            del parameters["seed"]
        if not parameters["stop"]:
            del parameters["stop"]
        return parameters

    def _receive(self) -> None:
        """Hand each row of the dataset to who waits for it; runs in a thread."""
        failure = "the dataset ended"
        try:
            # Not iter_rows: it keeps a row back until the next one has come.
            for rows in self._dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                for row in rows.to_pylist():
                    self._loop.call_soon_threadsafe(self._resolve, row)
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"
        # The job may be over, and its loop closed.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._fail, JobStoppedError(f"Ray: {failure}"))

    def _resolve(self, row: dict[str, Any]) -> None:
        future = self._waiting.get(int(row[_KEY]))
        if future is not None and not future.done():
            future.set_result(row)

    def _fail(self, failure: JobStoppedError) -> None:
        self._failure = failure
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(failure)


def _worker_resources() -> dict[str, float]:
    import ray

    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return {"CPU": 1.0, "GPU": 1.0} if resources.get("GPU") else {"CPU": 1.0}


def _connect(options: RayOptions, runtime_env: dict[str, Any]) -> None:
    import ray

    more: dict[str, Any] = {}
    if options.address == LOCAL:
        # The stages around the engines are counted as processors too.
        more["num_cpus"] = max(os.cpu_count() or 1, options.replicas + 3)
        more["include_dashboard"] = False
        # Ray lets workers run behind everything else on a machine; these are all that the cluster is for.
        more["_system_config"] = {"worker_niceness": 0}
    try:
        ray.init(address=options.address, runtime_env=runtime_env, log_to_driver=False, **more)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise JobStoppedError(f"--ray {options.address}: {error}") from None


def _dataset(
    arguments: dict[str, Any],
    options: RayOptions,
    resources: dict[str, float],
    each: int,
    runtime_env: dict[str, Any],
    queue: Any,
) -> Any:
    import ray
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.issue_detectors_config.detectors = []
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    # Every prompt is a block of its own: none waits until a block is full.
    context.target_max_block_size = 1
    engine = {name: value for name, value in arguments.items() if name not in ("model", "enable_log_requests")}
    config = vLLMEngineProcessorConfig(
        model_source=_reachable(arguments["model"]),
        engine_kwargs=engine,
        runtime_env=runtime_env,
        concurrency=(options.replicas, options.replicas),
        batch_size=1,
        max_concurrent_batches=each,
        max_tasks_in_flight_per_actor=each,
        max_pending_requests=each,
        should_continue_on_error=True,
        log_engine_metrics=False,
        chat_template_stage={"enabled": False},
        tokenize_stage={"enabled": False},
        detokenize_stage={"enabled": False},
        placement_group_config={"bundle_per_worker": resources},
    )
    small = {"num_cpus": 0.01}
    processor = build_processor(config, preprocess_map_kwargs=small, postprocess_map_kwargs=small)
    source = ray.data.read_datasource(_prompts(queue), num_cpus=0.01, override_num_blocks=1)
    return processor(source)


def _prompts(queue: Any) -> Any:
    """A data source of one read task, which ends when None comes through the queue."""
    import pyarrow as pa
    from ray.data.block import BlockMetadata
    from ray.data.datasource import Datasource, ReadTask

    def read() -> Iterator[Any]:
        while (request := queue.get()) is not None:
            yield pa.Table.from_pylist([request])

    class PromptSource(Datasource):  # type: ignore[misc]
        def estimate_inmemory_data_size(self) -> int | None:
            return None

        def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[Any]:
            return [ReadTask(read, BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None))]

    return PromptSource()  # type: ignore[no-untyped-call]


def _reachable(model: str) -> str:
    """A folder as an absolute path, which workers can find too if they share the file system."""
    return str(Path(model).resolve()) if Path(model).is_dir() else model


def _passed_variables() -> dict[str, str]:
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith(_PASSED_VARIABLES) and not name.endswith(_SECRETS)
    }


def _end_token_ids(tokenizer: Any) -> set[int]:
    end = getattr(tokenizer, "eos_token_id", None)
    return set() if end is None else {int(end)}
