"""One vLLM engine in a process of its own, which runs prompts when it is told to and returns times."""

import os
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from .shapes import CACHE_GIB, GIB, MAX_LENGTH
from .step_recorder import (
    MARGIN,
    PROFILED,
    SKIPPED,
    Event,
    start_prompts,
    start_recording,
    stop_prompts,
    stop_recording,
    stop_timeline,
)

# A start, with everything to be compiled, takes 1 to 2 minutes.
LONGEST_SECONDS = 300


class EngineProcess:
    """Starts at once; `wait` returns when the engine is ready. Methods of `_Engine` are called by name."""

    def __init__(self, name: str, folder: Path, is_ours: bool, options: dict[str, Any]) -> None:
        self._name = f"{name}, {'ours' if is_ours else 'stock'}"
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        # not a daemon: it has child processes
        self._process = context.Process(target=_serve, args=(theirs, name, folder, is_ours, options))
        self._process.start()
        theirs.close()

    def wait(self) -> Any:
        """What the last call returned; the first one is the engine's start, in seconds."""
        if not self._pipe.poll(LONGEST_SECONDS):
            raise TimeoutError(f"{self._name}: no answer for {LONGEST_SECONDS} s")
        result = self._pipe.recv()
        if isinstance(result, BaseException):
            raise result
        return result

    def __call__(self, method: str, *args: Any) -> Any:
        self._pipe.send((method, args))
        return self.wait()

    def close(self) -> None:
        """Stop the engine."""
        if self._process.is_alive():
            self._pipe.send(None)
            self._process.join(timeout=30)
        self._process.terminate()


def _serve(pipe: Connection, name: str, folder: Path, is_ours: bool, options: dict[str, Any]) -> None:
    try:
        begin = time.perf_counter()
        engine = _Engine(name, folder, is_ours, options)
        pipe.send(time.perf_counter() - begin)
        while (command := pipe.recv()) is not None:
            pipe.send(getattr(engine, command[0])(*command[1]))
    except Exception as error:
        pipe.send(RuntimeError(f"{name}, {'ours' if is_ours else 'stock'}: {error!r}"))
        raise
    engine.close()


class _Engine:
    def __init__(self, name: str, folder: Path, is_ours: bool, options: dict[str, Any]) -> None:
        os.environ |= {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
        # several engines start at the same time; a process with OpenMP threads must not be forked either
        os.environ["OMP_NUM_THREADS"] = "1"
        from vllm import LLM

        # What a user's engine has, but for room for two engines on one GPU and few CUDA graphs to capture.
        arguments: dict[str, Any] = {
            "load_format": "dummy", "skip_tokenizer_init": True, "seed": 0,
            "max_num_seqs": max(options["batches"]), "gpu_memory_utilization": 0.05,
        }  # fmt: skip
        if options["tiny"]:
            arguments |= {"max_model_len": 4096, "dtype": "float32", "enforce_eager": True}
        else:
            arguments |= {
                "dtype": "bfloat16", "max_model_len": MAX_LENGTH,
                "kv_cache_memory_bytes": CACHE_GIB[name] * GIB,
                "compilation_config": {"cudagraph_capture_sizes": options["batches"]},
            }  # fmt: skip
        if is_ours:
            own = {"table": str(folder / "table.safetensors")}
            arguments |= {"model_impl": "longmamba", "additional_config": {"longmamba": own}}
        arguments |= options.get("arguments", {})
        self.vocab_size = 200
        self.llm = LLM(str(folder), **arguments)

    def generate(self, prompts: int, length: int, max_tokens: int) -> float:
        """Seconds for a batch of equal prompts of random tokens."""
        import torch
        from vllm import SamplingParams

        tokens = torch.randint(1, self.vocab_size, (prompts, length)).tolist()
        inputs = [{"prompt_token_ids": prompt} for prompt in tokens]
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        begin = time.perf_counter()
        self.llm.generate(inputs, sampling, use_tqdm=False)
        return time.perf_counter() - begin

    def decode(self, batch: int, steps: int, is_profiled: bool) -> dict[str, Any]:
        """A decode step, see `stop_recording`; `steps` of them are timed."""
        recorded: dict[str, Any] = self._record(batch, steps, is_profiled, stop_recording)
        return recorded

    def timeline(self, batch: int, steps: int) -> list[Event]:
        """The kernels of decode steps, see `stop_timeline`; `steps` of them come before those."""
        events: list[Event] = self._record(batch, steps, True, stop_timeline)
        return events

    def _record(self, batch: int, steps: int, is_profiled: bool, stop: Callable[[Any], Any]) -> Any:
        self.on_worker(start_recording, batch, steps, is_profiled)
        self.generate(batch, 16, SKIPPED + steps + PROFILED * is_profiled + MARGIN)
        return self.on_worker(stop)

    def profile_prompts(self, prompts: int, length: int) -> dict[str, Any]:
        """Steps and kernels of a batch of equal prompts, see `stop_prompts`; not to be timed."""
        self.on_worker(start_prompts)
        self.generate(prompts, length, 1)
        profiled: dict[str, Any] = self.on_worker(stop_prompts, prompts * length)
        return profiled

    def on_worker(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run a function in the process of the model."""
        return self.llm.collective_rpc(function, args=args)[0]

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()


def set_filter(worker: Any, is_on: bool) -> None:
    """On the worker: hand the layers no rows for prompts, so that they run the kernels without the filter, or do."""
    from vllm_longmamba.layers import step_metadata as metadata

    builder = metadata._FilterRowsBuilder
    if not hasattr(builder, "filter_rows_before"):
        builder.filter_rows_before = builder._filter_rows
    own = builder.filter_rows_before
    builder._filter_rows = own if is_on else lambda self, common, step: metadata.FilterRows(step=step)


def peak_memory(worker: Any, reset: bool) -> float:
    """On the worker: GiB that were allocated at most since the last reset."""
    import torch

    peak = torch.cuda.max_memory_allocated() / GIB
    if reset:
        torch.cuda.reset_peak_memory_stats()
    return peak


def filtered_share(worker: Any) -> dict[str, float]:
    """On the worker: share of the global channels, of all layers together."""
    from vllm_longmamba.layers.filtered_mixer import filtered_mixers

    mixers = filtered_mixers(worker.model_runner.model)
    is_global = [(mixer.dt_threshold[1] > 0).float().mean().item() for mixer in mixers]
    return {"global_channels": sum(is_global) / len(is_global)}
