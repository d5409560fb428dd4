"""One way through a job of documents, in a process of its own: python support/job_process.py SETTINGS.json RESULT.json

Reads the settings of `summarize_job.py` and writes what was measured:
    start_seconds: from the start of this process, imports and all, until the engine is ready.
    seconds: from the first document's start to the last answer, after the warm-up.
    prompt_tokens, output_tokens: of each document.
"""

import asyncio
import json
import os
import sys
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.byte_documents import prompt_of, write_jsonl

STARTED = time.perf_counter()


def engine_arguments(settings: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `LLM`: vLLM's defaults but for what the model and the method need."""
    arguments = {name: settings[name] for name in ("model", "dtype", "max_model_len")} | settings["engine"]
    if settings["way"] == "longmamba":
        arguments |= {"model_impl": "longmamba", "additional_config": {"longmamba": {"table": settings["table"]}}}
    return arguments


def run_generate(settings: dict[str, Any]) -> dict[str, Any]:
    """`LLM.generate` over all prompts as strings."""
    from vllm import LLM, SamplingParams

    llm = LLM(**engine_arguments(settings))
    ready = time.perf_counter()
    sampling = SamplingParams(temperature=0.0, max_tokens=settings["answer_tokens"], ignore_eos=True)
    llm.generate([prompt_of(document) for document in settings["warm_up"]], sampling, use_tqdm=False)
    prompts = [prompt_of(document) for document in settings["documents"]]
    begin = time.perf_counter()
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    seconds = time.perf_counter() - begin
    llm.llm_engine.engine_core.shutdown()
    return {
        "start_seconds": ready - STARTED,
        "seconds": seconds,
        "prompt_tokens": [len(output.prompt_token_ids or []) for output in outputs],
        "output_tokens": [len(output.outputs[0].token_ids) for output in outputs],
    }


def run_command(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The command `longmamba summarize` from its arguments to its exit code, over a JSONL file.

    Two things are put into it: the warm-up, once its engine is ready and before it begins with the documents; and marks
    of the clock where its progress bar begins and where it counts a written answer. The last export of the output and
    the engine's end come after the clock.
    """
    from vllm_longmamba import cli
    from vllm_longmamba.summarize import job, progress, records

    clock: dict[str, float] = {}
    start_backend = job.start_backend

    async def start_and_warm_up(stack: AsyncExitStack, *given: Any) -> Any:
        backend, answerer = await start_backend(stack, *given)
        clock["ready"] = time.perf_counter()

        async def ask(prompts: list[Any]) -> list[Any]:
            return await asyncio.gather(*map(backend.complete, prompts))

        filled = (answerer.fill(records.Row("warm-up"), document, ask) for document in settings["warm_up"])
        await asyncio.gather(*filled)
        return backend, answerer

    class TimedProgress(progress.Progress):
        def begin(self) -> None:
            clock["begin"] = time.perf_counter()
            super().begin()

        def answered(self, row: Any, weight: float) -> None:
            super().answered(row, weight)
            clock["last"] = time.perf_counter()

    output = folder / "answers.jsonl"
    arguments = ["summarize", str(write_jsonl(folder / "documents.jsonl", settings["documents"])), "-o", str(output)]
    for name in ("model", "table", "dtype", "max_model_len"):
        arguments += [f"--{name.replace('_', '-')}", str(settings[name])]
    arguments += ["--max-tokens", str(settings["answer_tokens"]), "--engine-args", json.dumps(settings["engine"])]
    with patch.object(job, "start_backend", start_and_warm_up), patch.object(job, "Progress", TimedProgress):
        code = cli.app(arguments, standalone_mode=False)
    if code:
        raise RuntimeError(f"longmamba summarize ended with exit code {code}")
    rows = {row["id"]: row for row in map(json.loads, output.read_text().splitlines())}
    in_order = [rows[str(number)] for number in range(len(settings["documents"]))]
    return {
        "start_seconds": clock["ready"] - STARTED,
        "seconds": clock["last"] - clock["begin"],
        "prompt_tokens": [row["prompt_tokens"] for row in in_order],
        "output_tokens": [row["output_tokens"] for row in in_order],
    }


def main() -> None:
    settings_file, result_file = map(Path, sys.argv[1:])
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    settings = json.loads(settings_file.read_text())
    is_command = settings["way"] == "command"
    result = run_command(settings, result_file.parent) if is_command else run_generate(settings)
    result_file.write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
