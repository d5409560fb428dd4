"""The passes of a job on Ray, without a cluster: what goes into each, and what becomes of its rows."""

import asyncio
import io
import itertools
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from vllm_longmamba.summarize.answering import make_answerer
from vllm_longmamba.summarize.inputs import Inputs
from vllm_longmamba.summarize.job import admitted_records
from vllm_longmamba.summarize.progress import Progress
from vllm_longmamba.summarize.ray_data import RayRunner
from vllm_longmamba.summarize.settings import Fit, JobSettings, Sampling
from vllm_longmamba.summarize.store import Store
from vllm_longmamba.summarize.texts import TextExtractor

from .documents import stored_rows, write_jsonl

TOKENS = 10


class Passes(RayRunner):
    """Keeps blocks here, and answers each prompt with its first bytes, last prompt first.

    Attributes:
        passes: number of prompts in each.
        stop_after: rows after which the job is stopped.
    """

    stop_after: int | None = None

    def _put_block(self) -> None:
        self._blocks += [self._prompts] if self._prompts else []
        self._prompts = []

    def _answered(self, blocks: list[Any], environment: dict[str, Any]) -> Iterator[dict[str, Any]]:
        prompts = list(itertools.chain.from_iterable(blocks))
        self.passes = [*getattr(self, "passes", []), len(prompts)]
        for number, prompt in enumerate(reversed(prompts)):
            if number == self.stop_after:
                self.stop()
            tokens = prompt["tokenized_prompt"]
            refused = bytes(tokens).startswith(b"REFUSE")
            yield {
                "document": prompt["document"],
                "prompt": prompt["prompt"],
                "__inference_error__": "no" if refused else "",
                "generated_tokens": tokens[:TOKENS],
                "generated_text": bytes(tokens[:TOKENS]).decode(),
                "num_input_tokens": len(tokens),
            }


@pytest.fixture
def settings(tmp_path: Path) -> JobSettings:
    long = "".join(f"{number:04d}abcde. " for number in range(60))
    rows = [{"id": f"r{number}", "text": f"document {number}"} for number in range(100)]
    bad = [b"{torn\n", {"id": "refused", "text": "REFUSE"}]
    write_jsonl(tmp_path / "in.jsonl", [{"id": "long", "text": long}, *rows, *bad])
    sampling = Sampling(max_tokens=TOKENS)
    more: dict[str, Any] = {"ray_address": "local", "instruction": "Q:", "max_model_len": 110, "sampling": sampling}
    return JobSettings(
        inputs=(str(tmp_path / "in.jsonl"),),
        output=tmp_path / "out.jsonl",
        model="m",
        fit=Fit("map-reduce"),
        prompt_kind="base",
        **more,
    )


def run(settings: JobSettings, tokenizer: Any, stop_after: int | None = None) -> Passes:
    """One attempt of the job."""

    async def passes() -> Passes:
        progress = Progress(Console(file=io.StringIO()))
        with closing(Store(settings.output, settings.answer_settings())) as store:
            admitted = admitted_records(settings, Inputs(settings.inputs), store, progress)
            answerer = make_answerer(settings, tokenizer, None)
            runner = Passes(admitted, answerer, TextExtractor(), settings, store, progress)
            runner.stop_after = stop_after
            await runner._answer_in_passes({})
            return runner

    return asyncio.run(passes())


def test_passes(settings: JobSettings, tokenizer: Any) -> None:
    """One for all documents and sections, and one for each further level of the long one."""
    runner = run(settings, tokenizer)
    rows = {row["id"]: row for row in stored_rows(settings.output)}
    steps = rows["long"]["steps"]
    first = sum(step["level"] == 1 for step in steps)
    assert runner.passes[0] == 101 + first
    assert runner.passes[-1] == 1
    assert sum(runner.passes) == 101 + len(steps) + 1
    assert [step["section"] for step in steps if step["level"] == 1] == list(range(1, first + 1))
    assert steps[0]["summary"] == "0000abcde."
    assert rows["refused"]["error"] == "refused: no"
    assert rows[f"{settings.inputs[0]}#102"]["error"].startswith("bad row: not JSON")
    assert len(rows) == 103
    for number in range(100):
        row = rows[f"r{number}"]
        assert (row["summary"], row["output_tokens"], row["finish_reason"]) == (
            "document " + str(number)[0],
            10,
            "length",
        )
    assert runner.under_way == 0


def test_stopped_and_resumed(settings: JobSettings, tokenizer: Any) -> None:
    run(settings, tokenizer, stop_after=30)
    before = stored_rows(settings.output)
    assert 20 < len(before) < 40
    runner = run(settings, tokenizer)
    assert runner.passes[0] < 101
    after = stored_rows(settings.output)
    assert after[: len(before)] == before
    assert len(after) == 103
