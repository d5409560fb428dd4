"""Many engines on a Ray cluster, by Ray Data and its vLLM processor (`ray.data.llm`): read, build_processor, write.

This process reads and tokenizes all documents into the cluster's object store, one dataset takes them through the
engines, and each row is written as it comes back. Map-reduce takes a pass, a dataset of its own, for each level.
"""

import asyncio
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
from vllm_longmamba.summarize.records import Admitted, Completion, DiskFullError, JobStoppedError, RecordError
from vllm_longmamba.summarize.runner import Runner
from vllm_longmamba.summarize.settings import JobSettings
from vllm_longmamba.summarize.store import Store
from vllm_longmamba.summarize.texts import TextExtractor

_DEFAULT_MAX_NUM_SEQS = 256
_BLOCK_PROMPTS = 64
# Variables of the driver that decide how an engine runs; never a secret, which Ray would log.
_PASSED_VARIABLES = ("VLLM_", "HF_", "OMP_", "NUMBA_", "TRITON_")
_SECRETS = ("TOKEN", "KEY")


@dataclass
class _Document:
    admitted: Admitted
    steps: Steps
    # To its present prompts.
    answers: list[Completion | None] = field(default_factory=list)


class RayRunner(Runner):
    """Runs a job over records on a cluster."""

    def __init__(
        self,
        admitted: Iterator[Admitted],
        answerer: Answerer,
        extractor: TextExtractor,
        settings: JobSettings,
        store: Store,
        progress: Progress,
    ) -> None:
        super().__init__(admitted, answerer, extractor, None, store, progress)
        self._settings = settings
        self._waiting: dict[int, _Document] = {}
        self._prompts: list[dict[str, Any]] = []
        self._blocks: list[Any] = []

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

        try:
            with tempfile.TemporaryDirectory(prefix="longmamba-ray-") as staging:
                environment = {"py_modules": plugin_modules(Path(staging)), "env_vars": _passed_variables()}
                _connect(self._settings, environment)
                await self._answer_in_passes(environment)
        except (JobStoppedError, DiskFullError) as error:
            self.failure = error
        except Exception as error:
            if not self._stopped:
                self.failure = JobStoppedError(f"Ray: {type(error).__name__}: {error}")
        finally:
            ray.shutdown()
            self._extractor.close()
            self._progress.counts["dropped"] = self.under_way
        return self.failure is None and not self._stopped

    async def _answer_in_passes(self, environment: dict[str, Any]) -> None:
        while not self._stopped and (admitted := await asyncio.to_thread(next, self._admitted, None)):
            try:
                text = await self._extractor.text(admitted.record)
            except RecordError as error:
                self.finish(admitted, str(error))
                continue
            self._waiting[admitted.number] = _Document(admitted, self._answerer.steps(text, admitted.row))
            await asyncio.to_thread(self._advance, admitted.number, None)
        while not self._stopped and (self._prompts or self._blocks):
            await asyncio.to_thread(self._pass, environment)

    def _pass(self, environment: dict[str, Any]) -> None:
        self._put_block()
        blocks, self._blocks = self._blocks, []
        for row in self._answered(blocks, environment):
            if self._stopped:
                return
            if row["document"] in self._waiting:
                self._receive(row)

    def _advance(self, number: int, completions: list[Completion] | None) -> None:
        """Put the next prompts of a document into the next pass, or write its row."""
        document, error, prompts = self._waiting[number], None, []
        try:
            prompts = advance(document.steps, completions)
        except RecordError as failure:
            error = str(failure)
        document.answers = [None] * len(prompts)
        for index, prompt in enumerate(prompts):
            request = {"document": number, "prompt": index, "tokenized_prompt": prompt.token_ids}
            self._prompts.append(request | {"sampling_params": self._settings.sampling.parameters()})
            if len(self._prompts) == _BLOCK_PROMPTS:
                self._put_block()
        if not prompts:
            self._end(number, error)
        self.under_way = len(self._waiting)

    def _receive(self, row: dict[str, Any]) -> None:
        number = row["document"]
        if row["__inference_error__"]:
            self._end(number, f"refused: {row['__inference_error__']}")
            return
        tokens = list(row["generated_tokens"])
        # The processor does not hand the reason on.
        end = self._answerer.maker.tokenizer.eos_token_id
        cut = len(tokens) >= self._settings.sampling.max_tokens and tokens[-1] != end
        answers = self._waiting[number].answers
        answers[row["prompt"]] = Completion(
            row["generated_text"], row["num_input_tokens"], len(tokens), "length" if cut else "stop"
        )
        whole = [answer for answer in answers if answer is not None]
        if len(whole) == len(answers):
            self._advance(number, whole)

    def _end(self, number: int, error: str | None) -> None:
        self.finish(self._waiting.pop(number).admitted, error)
        self.under_way = len(self._waiting)

    def _put_block(self) -> None:
        import pyarrow as pa
        import ray

        if self._prompts:
            self._blocks.append(ray.put(pa.Table.from_pylist(self._prompts)))
            self._prompts = []

    def _answered(self, blocks: list[Any], environment: dict[str, Any]) -> Iterator[dict[str, Any]]:
        import ray
        from ray.data.llm import build_processor, vLLMEngineProcessorConfig

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        # Every prompt is a block of its own: none waits until a block is full.
        context.target_max_block_size = 1
        engine, replicas = dict(self._settings.engine), self._settings.replicas
        model = engine.pop("model")
        each = kept_full(int(engine.get("max_num_seqs") or _DEFAULT_MAX_NUM_SEQS))
        if self._settings.concurrency:
            each = math.ceil(self._settings.concurrency / replicas)
        device = "GPU" if ray.cluster_resources().get("GPU") else "CPU"  # type: ignore[no-untyped-call]
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
            **{f"{stage}_stage": {"enabled": False} for stage in ("chat_template", "tokenize", "detokenize")},
            placement_group_config={"bundle_per_worker": {"CPU": 1.0, device: 1.0}},
        )
        small = {"num_cpus": 0.01}
        processor = build_processor(config, preprocess_map_kwargs=small, postprocess_map_kwargs=small)
        # Not iter_rows: it keeps a row back until the next one has come.
        batches = processor(ray.data.from_arrow_refs(blocks)).iter_batches(
            batch_size=None, batch_format="pyarrow", prefetch_batches=0
        )
        return (row for batch in batches for row in batch.to_pylist())


def plugin_modules(folder: Path) -> list[str]:
    """Copy the plugin into a folder that must stay, in a form that Ray sends to workers without it.

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


def _connect(settings: JobSettings, environment: dict[str, Any]) -> None:
    import ray

    more: dict[str, Any] = {}
    if settings.ray_address == "local":
        # The stages around the engines are counted as processors too.
        more = {"num_cpus": max(os.cpu_count() or 1, settings.replicas + 3), "include_dashboard": False}
        # Ray lets workers run behind everything else on a machine; these are all that the cluster is for.
        more["_system_config"] = {"worker_niceness": 0}
    try:
        ray.init(address=settings.ray_address, runtime_env=environment, log_to_driver=False, **more)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise JobStoppedError(f"--ray {settings.ray_address}: {error}") from None


def _passed_variables() -> dict[str, str]:
    passed = [name for name in os.environ if name.startswith(_PASSED_VARIABLES) and not name.endswith(_SECRETS)]
    return {name: os.environ[name] for name in passed}
