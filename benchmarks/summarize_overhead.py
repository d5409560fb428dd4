"""What `longmamba summarize` costs: tokens per second of the job against a bare `LLM.generate` over the same prompts.

On a GPU (needs no network; dummy weights of the shape of mamba-1.4b, 200 documents of 4k to 64k tokens, 4.4 million in
all; pairs of runs until the next one would end after --most-seconds):

    python3 benchmarks/summarize_overhead.py --most-seconds 330 --out benchmarks/results/summarize_overhead_gpu

On a CPU (the example model, documents of 512 to 2048 tokens):

    python benchmarks/summarize_overhead.py --documents 96 --repeats 5 --out benchmarks/results/summarize_overhead_cpu

Both engines are in memory at once, in processes of their own, and take turns. The job reads JSONL, tokenizes, answers,
and writes JSONL with fsync; the bare call gets the same prompts as a list of strings, or with --tokenized as tokens,
made before the clock starts. Starting the engines is not counted. The lengths of the documents are spread evenly over
the logarithm. Prints each run, the medians, and the median of the ratios of neighbouring runs. --out NAME writes
NAME.json and NAME.md, anew after each pair.
"""

import argparse
import asyncio
import io
import json
import math
import os
import random
import statistics
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

# Two engines are started by a process that has run torch already: a fork of it may hang.
os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from support.byte_documents import EXAMPLE_MODEL, INSTRUCTION, add_tokenizer, make_documents, prompt_of, write_jsonl
from support.environment import environment
from support.shapes import CACHE_GIB, GIB, MODELS, write_model

WARM_UP_DOCUMENTS = 8


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=MODELS, help="of dummy weights [CPU: the example model; GPU: mamba-1.4b]")
    parser.add_argument("--tiny", action="store_true", help="two small layers, to try --shape out without a GPU")
    parser.add_argument("--documents", type=int, help="[24; with --shape 200]")
    parser.add_argument("--tokens", type=int, nargs=2, help="shortest and longest document [512 2048; 4096 65536]")
    parser.add_argument("--max-tokens", type=int, default=32, help="of an answer [%(default)s]")
    parser.add_argument("--max-num-seqs", type=int, help="[8; with --shape 64]")
    parser.add_argument("--repeats", type=int, default=3, help="pairs of runs [%(default)s]")
    parser.add_argument("--most-seconds", type=float, default=math.inf, help="no pair that would end later [no limit]")
    parser.add_argument("--tokenized", action="store_true", help="the bare call gets tokens instead of text")
    parser.add_argument("--out", type=Path, help="name of the results, without suffix")
    given = parser.parse_args()
    if given.shape is None and torch.cuda.is_available():
        given.shape = "mamba-1.4b"
    given.documents = given.documents or (200 if given.shape else 24)
    given.tokens = given.tokens or ([4096, 65536] if given.shape else [512, 2048])
    given.max_num_seqs = given.max_num_seqs or (64 if given.shape else 8)
    return given


def even_lengths(count: int, shortest: int, longest: int) -> list[int]:
    """Lengths whose logarithms are evenly spread between both, in random order."""
    lengths = [round(shortest * (longest / shortest) ** (number / max(count - 1, 1))) for number in range(count)]
    random.Random(0).shuffle(lengths)
    return lengths


def engine_options(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Arguments of both engines."""
    options: dict[str, Any] = {
        "model_impl": "longmamba",
        "max_model_len": given.tokens[1] + given.max_tokens + len(INSTRUCTION) + 64,
        "max_num_seqs": given.max_num_seqs,
        "enable_prefix_caching": False,
    }
    if given.shape is None:
        return options | {"model": str(EXAMPLE_MODEL), "dtype": "float32"}
    model = write_model(given.shape, folder / "model", given.tiny)
    add_tokenizer(model)
    return options | {
        "model": str(model),
        "dtype": "float32" if given.tiny else "bfloat16",
        "enforce_eager": given.tiny,
        "load_format": "dummy",
        "kv_cache_memory_bytes": GIB if given.tiny else CACHE_GIB[given.shape] * GIB,
        # Of what must be free at the start: two engines share the GPU.
        "gpu_memory_utilization": 0.3,
        "additional_config": {"longmamba": {"table": str(model / "table.safetensors")}},
    }


class BareRun:
    """`LLM.generate` over a list of prompts."""

    def __init__(self, options: dict[str, Any], documents: list[str], max_tokens: int, tokenized: bool) -> None:
        from vllm import LLM, SamplingParams

        self._llm = LLM(**options, disable_log_stats=True)
        self._prompts: list[Any] = [prompt_of(document) for document in documents]
        if tokenized:
            tokenizer = self._llm.get_tokenizer()
            self._prompts = [{"prompt_token_ids": tokenizer.encode(prompt)} for prompt in self._prompts]
        self._sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens)

    def run(self, count: int) -> tuple[float, int, list[str]]:
        """(seconds, tokens, answers) of the first documents."""
        begin = time.perf_counter()
        outputs = self._llm.generate(self._prompts[:count], self._sampling, use_tqdm=False)
        seconds = time.perf_counter() - begin
        tokens = sum(len(output.prompt_token_ids or []) + len(output.outputs[0].token_ids) for output in outputs)
        return seconds, tokens, [output.outputs[0].text for output in outputs]

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()


class JobRun:
    """The loop of `longmamba summarize`, over a JSONL file, with one engine for all runs."""

    def __init__(self, options: dict[str, Any], folder: Path, documents: list[str], max_tokens: int) -> None:
        from vllm_longmamba.summarize.engine import EngineBackend
        from vllm_longmamba.summarize.settings import JobSettings, Sampling

        self._folder = folder
        self._input = write_jsonl(folder / "documents.jsonl", documents)
        self._sampling = Sampling(max_tokens=max_tokens)
        self._settings = JobSettings
        self._loop = asyncio.new_event_loop()
        self._backend = self._loop.run_until_complete(self._start(EngineBackend, options))

    async def _start(self, backend: Any, options: dict[str, Any]) -> Any:
        return backend(options, self._sampling)

    def run(self, count: int) -> tuple[float, int, list[str]]:
        """(seconds, tokens, answers) of the first documents."""
        output = self._folder / "out.jsonl"
        settings = self._settings(
            inputs=(str(self._input),),
            output=output,
            model="bench",
            sampling=self._sampling,
            limit=count,
            overwrite=True,
        )
        begin = time.perf_counter()
        self._loop.run_until_complete(self._run(settings))
        seconds = time.perf_counter() - begin
        rows = {row["id"]: row for row in map(json.loads, output.read_text().splitlines())}
        tokens = sum(row["prompt_tokens"] + row["output_tokens"] for row in rows.values())
        return seconds, tokens, [rows[str(number)]["summary"] for number in range(count)]

    async def _run(self, settings: Any) -> None:
        from rich.console import Console

        from vllm_longmamba.summarize.answering import make_answerer
        from vllm_longmamba.summarize.inputs import Inputs
        from vllm_longmamba.summarize.job import admitted_records
        from vllm_longmamba.summarize.progress import Progress
        from vllm_longmamba.summarize.runner import Runner
        from vllm_longmamba.summarize.store import Store
        from vllm_longmamba.summarize.texts import TextExtractor

        with closing(Store(settings.output, settings.answer_settings(), overwrite=True)) as store:
            inputs = Inputs(settings.inputs)
            progress = Progress(Console(file=io.StringIO()))
            admitted = admitted_records(settings, inputs, store, progress)
            answerer = make_answerer(settings, self._backend.tokenizer, self._backend.max_model_len)
            complete = await Runner(admitted, answerer, TextExtractor(), self._backend, store, progress).run()
            store.export()
            if not complete or store.count(failed=True):
                raise RuntimeError(f"the job did not answer everything: {progress.report()}")

    def close(self) -> None:
        self._loop.run_until_complete(self._backend.close())


def main() -> None:
    begin = time.perf_counter()
    given = arguments()
    documents = make_documents(even_lengths(given.documents, *given.tokens), seed=0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options = engine_options(given, folder)
        bare = BareRun(options, documents, given.max_tokens, given.tokenized)
        job = JobRun(options, folder, documents, given.max_tokens)
        runners: dict[str, BareRun | JobRun] = {"bare": bare, "job": job}
        for runner in runners.values():
            runner.run(min(given.documents, WARM_UP_DOCUMENTS))
        print(f"both engines are ready after {time.perf_counter() - begin:.0f} s", flush=True)
        runs: dict[str, list[float]] = {"bare": [], "job": []}
        answers: dict[str, list[str]] = {}
        pair_seconds = 0.0
        for repeat in range(given.repeats):
            if repeat and time.perf_counter() - begin + pair_seconds > given.most_seconds:
                break
            pair_seconds = 0.0
            # Turned round each time, so that neither is always the first.
            for kind in sorted(runners, reverse=repeat % 2 == 1):
                seconds, tokens, answers[kind] = runners[kind].run(given.documents)
                pair_seconds += seconds
                runs[kind].append(tokens / seconds)
                print(f"{kind:4}  {seconds:8.2f} s  {tokens:,} tokens  {tokens / seconds:,.0f} tokens/s", flush=True)
            result = summary(given, runs, tokens, answers)
            if given.out is not None:
                write(given.out, result)
        print(sentence(result))
        job.close()
        bare.close()


def summary(
    given: argparse.Namespace, runs: dict[str, list[float]], tokens: int, answers: dict[str, list[str]]
) -> dict[str, Any]:
    """Everything that was measured so far."""
    return {
        "environment": environment(),
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in vars(given).items()},
        "tokens": tokens,
        "tokens_per_second": runs,
        "medians": {kind: statistics.median(values) for kind, values in runs.items()},
        # Neighbouring runs: what else the machine does changes more slowly than that.
        "ratio": statistics.median(job / bare for bare, job in zip(runs["bare"], runs["job"], strict=True)),
        "same": sum(first == second for first, second in zip(answers["bare"], answers["job"], strict=True)),
    }


def sentence(result: dict[str, Any]) -> str:
    """The result in words."""
    medians = result["medians"]
    return (
        f"medians: bare {medians['bare']:,.0f}, job {medians['job']:,.0f} tokens/s; median of job / bare: "
        f"{result['ratio']:.3f}; {result['same']} of {result['settings']['documents']} answers are the same"
    )


def write(out: Path, result: dict[str, Any]) -> None:
    """Write the JSON and the Markdown file."""
    out.parent.mkdir(parents=True, exist_ok=True)
    settings, about = result["settings"], result["environment"]
    # JSON knows no infinity.
    settings = {name: value for name, value in settings.items() if value != math.inf}
    out.with_suffix(".json").write_text(json.dumps(result | {"settings": settings}, indent=1) + "\n")
    model = f"dummy weights of the shape of {settings['shape']}" if settings["shape"] else EXAMPLE_MODEL.name
    if settings["tiny"]:
        model += ", cut down to two small layers"
    shortest, longest = settings["tokens"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = [
        "# Tokens per second of `longmamba summarize` and of a bare `LLM.generate`",
        "",
        f"`{about['command']}`, {about['date']}: {model}, {settings['documents']} documents of {shortest:,} to "
        f"{longest:,} tokens ({result['tokens']:,} tokens with instructions and answers), {settings['max_num_seqs']} "
        f"sequences at a time; the bare call gets {'tokens' if settings['tokenized'] else 'strings'}; "
        f"{about['device']}, {os.cpu_count()} CPU cores, {versions}.",
        "",
        "| pair | bare | job | job / bare |",
        "|---|---|---|---|",
    ]
    pairs = zip(result["tokens_per_second"]["bare"], result["tokens_per_second"]["job"], strict=True)
    for number, (bare, job) in enumerate(pairs, 1):
        lines.append(f"| {number} | {bare:,.0f} | {job:,.0f} | {job / bare:.3f} |")
    out.with_suffix(".md").write_text("\n".join([*lines, "", f"{sentence(result).capitalize()}.", ""]))


if __name__ == "__main__":
    main()
