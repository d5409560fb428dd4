"""Jobs on Ray, without a cluster: what goes there, and what becomes of its rows."""

import asyncio
import io
import queue
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from vllm_longmamba.commands.engine_options import EngineOptions, engine_arguments
from vllm_longmamba.summarize import ray_data
from vllm_longmamba.summarize.answering import make_answerer
from vllm_longmamba.summarize.inputs import Inputs
from vllm_longmamba.summarize.job import admitted_records
from vllm_longmamba.summarize.progress import Progress
from vllm_longmamba.summarize.ray_data import RayBackend
from vllm_longmamba.summarize.records import JobStoppedError
from vllm_longmamba.summarize.runner import Runner
from vllm_longmamba.summarize.settings import Fit, JobSettings, Sampling
from vllm_longmamba.summarize.store import Store
from vllm_longmamba.summarize.texts import TextExtractor

from .conftest import EXAMPLE_MODEL
from .documents import stored_rows, write_jsonl

TOKENS = 10


class PromptQueue:
    """Takes the place of Ray's queue.

    Attributes:
        prompts: rows that came through it.
        room: so many may come until it is gone.
    """

    room = 10**6

    def __init__(self) -> None:
        self.prompts: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

    async def put_async(self, table: Any) -> None:
        self.room -= 1
        if self.room < 0:
            raise RuntimeError("the actor died")
        (row,) = table.to_pylist()
        self.prompts.put(row)


class Cluster(RayBackend):
    """Answers each prompt with its first bytes, and dies after some."""

    dies_after = 10**6

    def _answers(self) -> Iterator[dict[str, Any]]:
        for _ in range(self.dies_after):
            prompt = self._prompts.prompts.get()
            tokens = prompt["tokenized_prompt"]
            assert prompt["sampling_params"] == {"max_tokens": TOKENS, "temperature": 0.0, "top_p": 1.0}
            yield {
                "number": prompt["number"],
                "__inference_error__": "no" if bytes(tokens).startswith(b"REFUSE") else "",
                "generated_tokens": tokens[:TOKENS],
                "generated_text": bytes(tokens[:TOKENS]).decode(),
                "num_input_tokens": len(tokens),
            }
        raise RuntimeError("all replicas died")


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> JobSettings:
    monkeypatch.setattr(ray_data, "_connected", lambda settings: PromptQueue())
    long = "".join(f"{number:04d}abcde. " for number in range(60))
    rows = [{"id": f"r{number}", "text": f"document {number}"} for number in range(100)]
    bad = [b"{torn\n", {"id": "refused", "text": "REFUSE"}, {"id": "short", "text": "short"}]
    write_jsonl(tmp_path / "in.jsonl", [{"id": "long", "text": long}, *rows, *bad])
    options = EngineOptions(max_model_len=110, dtype="float32", engine_args={"max_num_seqs": 4})
    return JobSettings(
        inputs=[str(tmp_path / "in.jsonl")],
        output=tmp_path / "out.jsonl",
        model=str(EXAMPLE_MODEL),
        engine=engine_arguments(str(EXAMPLE_MODEL), options),
        fit=Fit("map-reduce"),
        prompt_kind="base",
        ray_address="local",
        replicas=2,
        instruction="Q:",
        sampling=Sampling(max_tokens=TOKENS),
    )


def run(settings: JobSettings, dies_after: int = 10**6) -> Progress:
    """One attempt of the job."""

    async def answer() -> Progress:
        progress = Progress(Console(file=io.StringIO()))
        with closing(Store(settings.output, settings.answer_settings())) as store:
            admitted = admitted_records(settings, Inputs(settings.inputs), store, progress)
            backend = Cluster(settings)
            backend.dies_after = dies_after
            assert backend.concurrency == 2 * 8
            backend.connect()
            answerer = make_answerer(settings, backend.tokenizer, backend.max_model_len)
            assert await Runner(admitted, answerer, TextExtractor(), backend, store, progress).run()
        return progress

    return asyncio.run(answer())


def test_answers(settings: JobSettings) -> None:
    """Of documents, of sections and the levels above them; what the engine refuses is an error row."""
    run(settings)
    rows = {row["id"]: row for row in stored_rows(settings.output)}
    assert len(rows) == 104
    steps = rows["long"]["steps"]
    first = sum(step["level"] == 1 for step in steps)
    assert [step["section"] for step in steps if step["level"] == 1] == list(range(1, first + 1))
    assert steps[0]["summary"] == "0000abcde."
    assert rows["refused"]["error"] == "refused: no"
    assert rows[f"{settings.inputs[0]}#102"]["error"].startswith("bad row: not JSON")
    for number in range(100):
        row = rows[f"r{number}"]
        said = (row["summary"], row["prompt_tokens"], row["output_tokens"], row["finish_reason"])
        assert said == (f"document {str(number)[0]}", len(f"document {number}\n\nQ:"), 10, "length")
    assert (rows["short"]["summary"], rows["short"]["finish_reason"]) == ("short\n\nQ:", "stop")


def test_a_cluster_that_dies(settings: JobSettings) -> None:
    """The job ends with what was answered, and goes on from there."""
    with pytest.raises(JobStoppedError, match="Ray: RuntimeError: all replicas died"):
        run(settings, dies_after=50)
    before = stored_rows(settings.output)
    assert 20 < len(before) <= 51
    assert all(row["error"] is None for row in before)
    progress = run(settings)
    assert progress.counts["done before"] == len(before)
    after = stored_rows(settings.output)
    assert after[: len(before)] == before
    assert len(after) == 104


def test_a_queue_that_dies(settings: JobSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    """No document is to blame for it: the job ends, and goes on from there."""
    monkeypatch.setattr(PromptQueue, "room", 50)
    with pytest.raises(JobStoppedError, match="Ray: RuntimeError: the actor died"):
        run(settings)
    before = stored_rows(settings.output)
    assert len(before) <= 51
    assert all(row["error"] is None or row["id"] == "refused" for row in before)
