"""Many engines on a Ray cluster, by Ray Data and its vLLM processor (`ray.data.llm`): read, build_processor, write.

This process reads and tokenizes all documents into the cluster's object store, one dataset takes them through the
engines, and each row is written as it comes back. Map-reduce takes a pass, a dataset of its own, for each level.
"""

import asyncio
import itertools
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from vllm_longmamba.summarize.answering import Answerer, Steps, advance
from vllm_longmamba.summarize.engine import kept_full
from vllm_longmamba.summarize.progress import Progress
from vllm_longmamba.summarize.records import Completion, DiskFullError, JobStoppedError, RecordError
from vllm_longmamba.summarize.runner import Admitted
from vllm_longmamba.summarize.settings import JobSettings
from vllm_longmamba.summarize.store import Store
from vllm_longmamba.summarize.texts import TextExtractor
from vllm_longmamba.summarize.watchdog import Watchdog

_DEFAULT_MAX_NUM_SEQS = 256
_BLOCK_PROMPTS = 64
_DISTRIBUTION = "vllm-longmamba"
# Variables of the driver that decide how an engine runs; never a secret, which Ray would log.
_PASSED_VARIABLES = ("VLLM_", "HF_", "OMP_", "NUMBA_", "TRITON_")
_SECRETS = ("TOKEN", "KEY")


@dataclass
class _Document:
    admitted: Admitted
    steps: Steps
    answers: list[Completion | None] = field(default_factory=list)


class RayRunner:
    """Runs a job over records on a cluster; as `Runner`.

    Args:
        admitted: records to answer.
        answerer: knows the prompts of a document.
        extractor: makes text of records.
        tokenizer: of the model.
        settings: of the job.
        store: gets the rows.
        progress: is told what happens.
    """

    def __init__(
        self,
        admitted: Iterator[Admitted],
        answerer: Answerer,
        extractor: TextExtractor,
        tokenizer: Any,
        settings: JobSettings,
        store: Store,
        progress: Progress,
    ) -> None:
        self._admitted, self._answerer, self._extractor = admitted, answerer, extractor
        self._settings, self._store, self._progress = settings, store, progress
        self._end = getattr(tokenizer, "eos_token_id", None)
        self._documents: dict[int, _Document] = {}
        self._prompts: list[dict[str, Any]] = []
        self._blocks: list[Any] = []
        self._stopped = False
        self.failure: JobStoppedError | DiskFullError | None = None

    @property
    def under_way(self) -> int:
        """Documents that are read and have no row yet."""
        return len(self._documents)

    def stop(self) -> None:
        """End after the next row."""
        self._stopped = True

    def abort(self) -> None:
        """End at once."""
        import ray

        self.stop()
        ray.shutdown()

    async def run(self) -> bool:
        """Answer the records; whether all of them have a row now."""
        import ray

        # Never stopped: it waits for the end of this process, and ends what Ray leaves of a cluster on this machine.
        Watchdog()
        loop = asyncio.get_running_loop()
        try:
            with tempfile.TemporaryDirectory(prefix="longmamba-ray-") as staging:
                environment = {"py_modules": plugin_modules(Path(staging)), "env_vars": _passed_variables()}
                _connect(self._settings, environment)
                await asyncio.to_thread(self._passes, loop, environment)
        except (JobStoppedError, DiskFullError) as error:
            self.failure = error
        except Exception as error:
            if not self._stopped:
                self.failure = JobStoppedError(f"Ray: {type(error).__name__}: {error}")
        finally:
            ray.shutdown()
            self._extractor.close()
        self._progress.dropped = len(self._documents)
        return self.failure is None and not self._stopped

    def _passes(self, loop: asyncio.AbstractEventLoop, environment: dict[str, Any]) -> None:
        for admitted in self._admitted:
            if self._stopped:
                return
            admitted.begin()
            try:
                text = asyncio.run_coroutine_threadsafe(self._extractor.text(admitted.record), loop).result()
            except RecordError as error:
                admitted.finish(self._store, self._progress, str(error))
                continue
            document = _Document(admitted, self._answerer.steps(text, admitted.row))
            self._documents[admitted.number] = document
            self._advance(document, None)
        while blocks := self._taken():
            for row in self._answered(blocks, environment):
                if self._stopped:
                    return
                self._receive(row)

    def _advance(self, document: _Document, completions: list[Completion] | None) -> None:
        """Put the next prompts of a document into the next pass, or write its row."""
        error, prompts = None, []
        try:
            prompts = advance(document.steps, completions)
        except RecordError as failure:
            error = str(failure)
        document.answers = [None] * len(prompts)
        number = document.admitted.number
        for index, prompt in enumerate(prompts):
            request = {"document": number, "prompt": index, "tokenized_prompt": prompt.token_ids}
            self._prompts.append(request | {"sampling_params": self._settings.sampling.parameters()})
            if len(self._prompts) == _BLOCK_PROMPTS:
                self._put_block()
        if not prompts:
            self._finish(document, error)

    def _receive(self, row: dict[str, Any]) -> None:
        document = self._documents.get(int(row["document"]))
        if document is None:
            return
        if row["__inference_error__"]:
            self._finish(document, f"refused: {row['__inference_error__']}")
            return
        tokens = [int(token) for token in row["generated_tokens"]]
        # The processor does not hand the reason on.
        cut = len(tokens) >= self._settings.sampling.max_tokens and tokens[-1] != self._end
        reason = "length" if cut else "stop"
        answer = Completion(row["generated_text"], int(row["num_input_tokens"]), len(tokens), reason)
        document.answers[int(row["prompt"])] = answer
        answers = [each for each in document.answers if each is not None]
        if len(answers) == len(document.answers):
            self._advance(document, answers)

    def _finish(self, document: _Document, error: str | None) -> None:
        del self._documents[document.admitted.number]
        document.admitted.finish(self._store, self._progress, error)

    def _put_block(self) -> None:
        import pyarrow as pa
        import ray

        self._blocks.append(ray.put(pa.Table.from_pylist(self._prompts)))
        self._prompts = []

    def _taken(self) -> list[Any]:
        """The blocks of the next pass."""
        if self._prompts:
            self._put_block()
        blocks, self._blocks = self._blocks, []
        return blocks

    def _answered(self, blocks: list[Any], environment: dict[str, Any]) -> Iterator[dict[str, Any]]:
        import ray
        from ray.data.llm import build_processor, vLLMEngineProcessorConfig

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        # Every prompt is a block of its own: none waits until a block is full.
        context.target_max_block_size = 1
        settings, engine = self._settings, dict(self._settings.engine)
        model, replicas = engine.pop("model"), settings.replicas
        each = kept_full(int(engine.get("max_num_seqs") or _DEFAULT_MAX_NUM_SEQS))
        each = math.ceil(settings.concurrency / replicas) if settings.concurrency else each
        has_gpu = ray.cluster_resources().get("GPU")  # type: ignore[no-untyped-call]
        off = {"enabled": False}
        config = vLLMEngineProcessorConfig(
            # As an absolute path, which workers can find too if they share the file system.
            model_source=str(Path(model).resolve()) if Path(model).is_dir() else model,
            engine_kwargs=engine,
            runtime_env=environment,
            concurrency=(replicas, replicas),
            batch_size=1,
            **dict.fromkeys(("max_concurrent_batches", "max_tasks_in_flight_per_actor", "max_pending_requests"), each),
            should_continue_on_error=True,
            log_engine_metrics=False,
            **dict.fromkeys(("chat_template_stage", "tokenize_stage", "detokenize_stage"), off),
            placement_group_config={
                "bundle_per_worker": settings.replica_resources or {"CPU": 1.0, **({"GPU": 1.0} if has_gpu else {})}
            },
        )
        small = {"num_cpus": 0.01}
        processor = build_processor(config, preprocess_map_kwargs=small, postprocess_map_kwargs=small)
        # Not iter_rows: it keeps a row back until the next one has come.
        batches = processor(ray.data.from_arrow_refs(blocks)).iter_batches(
            batch_size=None, batch_format="pyarrow", prefetch_batches=0
        )
        return itertools.chain.from_iterable(batch.to_pylist() for batch in batches)


def plugin_modules(folder: Path) -> list[str]:
    """Copy the plugin into a folder, in a form that Ray sends to workers, which need not have it installed.

    Args:
        folder: where to put them; must stay until the job ends.

    Returns:
        Entries for `py_modules` of a runtime environment: the package, and its metadata, through which vLLM finds it.
    """
    import vllm_longmamba
    from vllm_longmamba import kernels, tables

    package = folder / "vllm_longmamba"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(vllm_longmamba.__file__).parent, package, ignore=ignored)
    # In a source checkout these two stand elsewhere.
    for part in (kernels, tables):
        name = part.__name__.rpartition(".")[2]
        shutil.copytree(Path(str(part.__file__)).parent, package / name, dirs_exist_ok=True, ignore=ignored)
    information = folder / f"vllm_longmamba-{vllm_longmamba.__version__}.dist-info"
    information.mkdir()
    installed = metadata.distribution(_DISTRIBUTION)
    for name in ("METADATA", "entry_points.txt"):
        (information / name).write_text(installed.read_text(name) or "", encoding="utf-8")
    return [str(package), str(information)]


def _connect(settings: JobSettings, environment: dict[str, Any]) -> None:
    import ray

    more: dict[str, Any] = {}
    if settings.ray_address == "local":
        # The stages around the engines are counted as processors too.
        more["num_cpus"] = max(os.cpu_count() or 1, settings.replicas + 3)
        more["include_dashboard"] = False
        # Ray lets workers run behind everything else on a machine; these are all that the cluster is for.
        more["_system_config"] = {"worker_niceness": 0}
    try:
        ray.init(address=settings.ray_address, runtime_env=environment, log_to_driver=False, **more)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise JobStoppedError(f"--ray {settings.ray_address}: {error}") from None


def _passed_variables() -> dict[str, str]:
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith(_PASSED_VARIABLES) and not name.endswith(_SECRETS)
    }
