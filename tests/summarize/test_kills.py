"""kill -9 at any moment: nothing lost, nothing twice. And a hundred thousand records in flat memory."""

import asyncio
import io
import json
import multiprocessing
import os
import random
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from vllm_longmamba.summarize.admission import admit
from vllm_longmamba.summarize.answering import Answerer, Fit
from vllm_longmamba.summarize.index import Index
from vllm_longmamba.summarize.inputs import Inputs
from vllm_longmamba.summarize.job import run_job
from vllm_longmamba.summarize.journal import Journal
from vllm_longmamba.summarize.progress import Progress
from vllm_longmamba.summarize.prompts import Prompt, PromptMaker
from vllm_longmamba.summarize.records import Completion
from vllm_longmamba.summarize.runner import Runner
from vllm_longmamba.summarize.settings import JobSettings
from vllm_longmamba.summarize.sources import SourceOptions, read_records
from vllm_longmamba.summarize.texts import TextExtractor

from .documents import write_jsonl
from .stub_server import StubServer, answer

KILLS = 50
FEW_KILLS = 5
CONCURRENCY = 8
SERVER_DELAY_S = 0.01


def run(folder: str, output: str, url: str) -> None:
    """One attempt of the job, in a process of its own."""
    settings = JobSettings(
        inputs=(f"{folder}/in",),
        output=Path(folder) / output,
        base_url=url,
        prompt_kind="base",
        concurrency=CONCURRENCY,
    )
    raise SystemExit(run_job(settings, Console(file=io.StringIO())))


@pytest.mark.parametrize(
    ("output", "kills"),
    [
        ("out.jsonl", FEW_KILLS),
        ("out.parquet", FEW_KILLS),
        pytest.param("out.jsonl", KILLS // 2, marks=pytest.mark.slow),
        pytest.param("out.parquet", KILLS - KILLS // 2, marks=pytest.mark.slow),
    ],
)
def test_kills(tmp_path: Path, output: str, kills: int) -> None:
    """Each attempt is killed at a random moment: while it starts, reads, asks, writes or finishes."""
    count = 60 * kills
    records = [{"id": f"r{number}", "text": f"text {number}"} for number in range(count)]
    bad = [b"{torn\n", {"id": "none"}]
    write_jsonl(tmp_path / "in" / "rows.jsonl", [*records[: count // 2], *bad, *records[count // 2 :]])
    (tmp_path / "in" / "z.txt").write_bytes(b"\xff")
    rng = random.Random(output)
    # A process that has imported everything, and forks: attempts start in milliseconds.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vllm_longmamba.summarize.job", "openai", __name__])
    killed = 0
    with StubServer(delay_s=SERVER_DELAY_S) as server:
        while killed < kills:
            attempt = context.Process(target=run, args=(str(tmp_path), output, server.url))
            attempt.start()
            served = sum(server.requests.values())
            deadline = time.monotonic() + 60
            # Half of the attempts die at some moment after their first answers, the others at some moment at all.
            if killed % 2:
                while sum(server.requests.values()) < served + rng.randrange(1, 60) and time.monotonic() < deadline:
                    time.sleep(0.001)
                attempt.join(rng.uniform(0.0, 0.02))
            else:
                attempt.join(rng.uniform(0.0, 0.6))
            if attempt.is_alive():
                attempt.kill()
                killed += 1
            attempt.join()
            check_half_done(tmp_path / output)
            if attempt.exitcode == 3:
                # Complete before enough kills: more records come.
                more = [{"id": f"r{number}", "text": f"text {number}"} for number in range(count, count + 60)]
                write_jsonl(tmp_path / "in" / f"more{count}.jsonl", more)
                count += 60
        last = context.Process(target=run, args=(str(tmp_path), output, server.url))
        last.start()
        last.join(120)
        asked = server.requests
    assert last.exitcode == 3
    found = rows_of(tmp_path / output)
    assert found.keys() == {f"r{n}" for n in range(count)} | {
        f"{tmp_path}/in/rows.jsonl#{count_of(tmp_path)}",
        "none",
        f"{tmp_path}/in/z.txt",
    }
    for number in range(count):
        assert found[f"r{number}"] == answer(f"text {number}\n\nTL;DR:")
    # At most what was under way at each kill was asked again.
    assert sum(asked.values()) - count <= killed * CONCURRENCY


def count_of(folder: Path) -> int:
    """Row of the torn line."""
    lines = (folder / "in" / "rows.jsonl").read_bytes().splitlines()
    return lines.index(b"{torn") + 1


def check_half_done(output: Path) -> None:
    """After a kill: whole rows, perhaps but for the last, and no id twice."""
    journal = output if output.suffix == ".jsonl" else output.with_name(f"{output.name}.partial.jsonl")
    if not journal.exists():
        return
    lines = journal.read_bytes().split(b"\n")
    ids = [json.loads(line)["id"] for line in lines[:-1]]
    assert len(set(ids)) == len(ids)


def rows_of(output: Path) -> dict[str, str | None]:
    """Summary by id; no id may come twice."""
    if output.suffix == ".parquet":
        import pyarrow.parquet as pq

        rows = pq.read_table(output).to_pylist()
    else:
        rows = [json.loads(line) for line in output.read_text().splitlines()]
    found = {row["id"]: row["summary"] for row in rows}
    assert len(found) == len(rows)
    return found


class InstantBackend:
    """Answers without a server."""

    chat = False
    tokenizer = None
    max_model_len = None
    concurrency = 32

    async def complete(self, prompt: Prompt) -> Completion:
        await asyncio.sleep(0)
        return Completion("a short answer", 10, 3, "stop")

    async def close(self) -> None:
        pass


def resident_bytes() -> int:
    """Memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


@pytest.mark.slow
def test_memory_is_flat(tmp_path: Path) -> None:
    """100,000 small records: the last 80,000 add next to nothing to what the first 20,000 took."""
    count, first = 100_000, 20_000
    write_jsonl(tmp_path / "in.jsonl", ({"id": f"record-{n}", "text": f"text {n} " * 20} for n in range(count)))
    progress = Progress(Console(file=io.StringIO()), 0)
    journal = Journal(tmp_path / "out.jsonl")
    index = Index()
    journal.load(index)
    sizes: dict[int, int] = {}

    def watched() -> Iterator[object]:
        records = read_records(Inputs([str(tmp_path / "in.jsonl")]), SourceOptions())
        for number, admitted in enumerate(admit(records, index, b"", progress)):
            if number in (first, count - 1):
                sizes[number] = resident_bytes()
            yield admitted

    async def run_all() -> bool:
        backend = InstantBackend()
        answerer = Answerer(backend, Fit(), 10, None)
        maker = PromptMaker(False, None, None, None)
        runner = Runner(watched(), answerer, maker, TextExtractor(), journal, progress, backend.concurrency)  # type: ignore[arg-type]
        return await runner.run()

    assert asyncio.run(run_all())
    journal.close()
    assert progress.documents == count
    with (tmp_path / "out.jsonl").open("rb") as lines:
        assert sum(1 for _ in lines) == count
    grown = sizes[count - 1] - sizes[first]
    print(f"{grown / 2**20:.1f} MiB more after {count - first} records, pid {os.getpid()}")
    # The page cache of the index may fill up to 8 MiB; nothing else may grow.
    assert grown < 12 * 2**20
