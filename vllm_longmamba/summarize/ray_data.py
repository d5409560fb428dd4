"""Many engines on a Ray cluster: one dataset, from a queue of prompts through Ray Data's vLLM processor to answers."""

import asyncio
import itertools
import logging
import math
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from vllm_longmamba.summarize.engine import kept_full, tokenizer_and_length
from vllm_longmamba.summarize.prompts import Prompt
from vllm_longmamba.summarize.records import Completion, JobStoppedError, RecordError
from vllm_longmamba.summarize.settings import JobSettings

_DEFAULT_MAX_NUM_SEQS = 256
_END_TIMEOUT_S = 10.0
# A stage around the engines needs next to nothing.
_SMALL = {"num_cpus": 0.01}
# Comes before all prompts.
_BEGIN = "begin"
# Variables of the driver that decide how an engine runs; never a secret, which Ray would log.
_PASSED_VARIABLES = ("VLLM_", "HF_", "OMP_", "NUMBA_", "TRITON_")
_SECRETS = ("TOKEN", "KEY")


class RayBackend:
    """The engines of a cluster; `connect` must come first.

    Raises:
        ValueError: vLLM refuses the arguments.
    """

    def __init__(self, settings: JobSettings) -> None:
        self._settings = settings
        self.tokenizer, self.max_model_len = tokenizer_and_length(settings.engine)
        # Prompts in each engine.
        self._each = kept_full(int(settings.engine.get("max_num_seqs") or _DEFAULT_MAX_NUM_SEQS))
        if settings.concurrency:
            self._each = math.ceil(settings.concurrency / settings.replicas)
        self.concurrency = settings.concurrency or self._each * settings.replicas
        self._numbers = itertools.count()
        # What becomes a row of the dataset, by the number of its prompt.
        self._waiting: dict[int, Future[dict[str, Any]]] = {}
        self._failure: JobStoppedError | None = None
        # From this process to the first stage of the dataset; None ends it.
        self._prompts: Any = None
        self._reading = threading.Thread(target=self._read_answers, name="ray-answers", daemon=True)

    def connect(self) -> None:
        """Reach or start the cluster, and start the engines there.

        Raises:
            JobStoppedError: the cluster cannot be reached.
        """
        self._prompts = _connected(self._settings)
        self._reading.start()

    async def complete(self, prompt: Prompt) -> Completion:
        """Answer one prompt; see `Backend`."""
        import pyarrow as pa

        parameters = self._settings.sampling.parameters()
        number, future = next(self._numbers), Future[dict[str, Any]]()
        self._waiting[number] = future
        request = {"number": number, "tokenized_prompt": prompt.token_ids, "sampling_params": parameters}
        try:
            if self._failure is not None:
                raise self._failure
            await self._put(pa.Table.from_pylist([request]))
            row = await asyncio.wrap_future(future)
        finally:
            del self._waiting[number]
        if row["__inference_error__"]:
            raise RecordError("refused", row["__inference_error__"])
        tokens = row["generated_tokens"]
        # The processor does not hand the reason on.
        is_cut = len(tokens) >= parameters["max_tokens"] and tokens[-1] != self.tokenizer.eos_token_id
        return Completion(row["generated_text"], row["num_input_tokens"], len(tokens), "length" if is_cut else "stop")

    async def close(self) -> None:
        """End the engines, and a cluster that was started for them."""
        import ray

        if self._prompts is not None and self._failure is None:
            # Without an end of its dataset Ray would say that it failed.
            await self._prompts.put_async(None)
            await asyncio.to_thread(self._reading.join, _END_TIMEOUT_S)
        ray.shutdown()

    async def _put(self, prompt: Any) -> None:
        try:
            await self._prompts.put_async(prompt)
        except Exception as error:
            # Of Ray: the queue is gone, and no other prompt gets further than this one.
            self._failure = JobStoppedError(f"Ray: {type(error).__name__}: {error}")
            raise self._failure from None

    def _read_answers(self) -> None:
        """Hand each answer to who waits for it; in a thread of its own, until the dataset ends."""
        # Who waits may give up at any moment.
        given_up = suppress(KeyError, InvalidStateError)
        try:
            for row in self._answers():
                with given_up:
                    self._waiting[row["number"]].set_result(row)
            raise RuntimeError("the dataset ended")
        except Exception as error:
            self._failure = JobStoppedError(f"Ray: {type(error).__name__}: {error}")
        for future in list(self._waiting.values()):
            with given_up:
                future.set_exception(self._failure)

    def _answers(self) -> Iterator[dict[str, Any]]:
        """Rows of the dataset, as they come."""
        import ray
        from ray.data.llm import build_processor, vLLMEngineProcessorConfig

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        engine, replicas = dict(self._settings.engine), self._settings.replicas
        model = engine.pop("model")
        device = "GPU" if ray.cluster_resources().get("GPU") else "CPU"  # type: ignore[no-untyped-call]
        config = vLLMEngineProcessorConfig(
            # As an absolute path, which workers can find too if they share the file system.
            model_source=str(Path(model).resolve()) if Path(model).is_dir() else model,
            engine_kwargs=engine,
            concurrency=(replicas, replicas),
            batch_size=1,
            max_concurrent_batches=self._each,
            max_tasks_in_flight_per_actor=self._each,
            max_pending_requests=self._each,
            should_continue_on_error=True,
            log_engine_metrics=False,
            chat_template_stage={"enabled": False},
            tokenize_stage={"enabled": False},
            detokenize_stage={"enabled": False},
            placement_group_config={"bundle_per_worker": {"CPU": 1.0, device: 1.0}},
        )
        processor = build_processor(config, preprocess_map_kwargs=_SMALL, postprocess_map_kwargs=_SMALL)
        # Not iter_rows: it keeps a row back until the next one has come.
        for batch in processor(prompt_dataset(self._prompts)).iter_batches(
            batch_size=None, batch_format="pyarrow", prefetch_batches=0
        ):
            yield from batch.to_pylist()


def prompt_queue() -> Any:
    """A queue on the cluster, from this process to the first stage of the dataset."""
    from ray.util.queue import Queue

    prompts = Queue(actor_options={"num_cpus": 0})
    prompts.put(_BEGIN)
    return prompts


def prompt_dataset(prompts: Any) -> Any:
    """What comes through a queue, until None does."""
    import ray

    # Ray sends a function that stands in another one as a whole: workers need not have what this module imports.
    def take(_: Any) -> Iterator[Any]:
        # After a crash Ray runs it again. Prompts that it had taken are lost then, and who asked would wait for ever.
        if prompts.get_nowait() != _BEGIN:
            raise RuntimeError("the task that takes prompts has crashed")
        yield from iter(prompts.get, None)

    # Every prompt is a block of its own: none waits until a block is full.
    ray.data.DataContext.get_current().target_max_block_size = 1
    return ray.data.range(1).map_batches(take, batch_format="pyarrow", **_SMALL)


def plugin_modules(folder: Path) -> list[str]:
    """Copy the plugin into a folder, in a form that Ray sends to workers without it.

    Returns:
        Entries for `py_modules` of a runtime environment: the package, and its metadata, through which vLLM finds it.
    """
    import vllm_longmamba
    from vllm_longmamba import kernels, tables

    package = folder / "vllm_longmamba"
    ignored = shutil.ignore_patterns("__pycache__")
    # In a source checkout the last two stand elsewhere.
    for part, place in ((vllm_longmamba, package), (kernels, package / "kernels"), (tables, package / "tables")):
        shutil.copytree(Path(str(part.__file__)).parent, place, dirs_exist_ok=True, ignore=ignored)
    information = folder / f"vllm_longmamba-{vllm_longmamba.__version__}.dist-info"
    information.mkdir()
    for name in ("METADATA", "entry_points.txt"):
        text = metadata.distribution("vllm-longmamba").read_text(name) or ""
        (information / name).write_text(text, encoding="utf-8")
    return [str(package), str(information)]


def _connected(settings: JobSettings) -> Any:
    """Reach or start the cluster, and give its workers the plugin; a queue there for the prompts."""
    import ray

    more: dict[str, Any] = {}
    if settings.ray_address == "local":
        # The stages around the engines are counted as processors too.
        more = {"num_cpus": max(os.cpu_count() or 1, settings.replicas + 3), "include_dashboard": False}
        # Ray lets workers run behind everything else on a machine; these are all that the cluster is for.
        more["_system_config"] = {"worker_niceness": 0}
    passed = [name for name in os.environ if name.startswith(_PASSED_VARIABLES) and not name.endswith(_SECRETS)]
    with tempfile.TemporaryDirectory(prefix="longmamba-ray-") as staging:
        environment = {
            "py_modules": plugin_modules(Path(staging)),
            "env_vars": {name: os.environ[name] for name in passed},
        }
        try:
            ray.init(address=settings.ray_address, runtime_env=environment, log_to_driver=False, **more)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise JobStoppedError(f"--ray {settings.ray_address}: {error}") from None
    return prompt_queue()
