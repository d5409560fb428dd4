"""kill -9 at any moment: nothing lost, nothing twice. And a hundred thousand records in flat memory."""

import asyncio
import gzip
import io
import json
import multiprocessing
import os
import random
import resource
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tenacity
from rich.console import Console

from vllm_longmamba.summarize import runner, server
from vllm_longmamba.summarize.answering import Answerer
from vllm_longmamba.summarize.inputs import Inputs
from vllm_longmamba.summarize.job import admitted_records, run_job
from vllm_longmamba.summarize.progress import Progress
from vllm_longmamba.summarize.prompts import Prompt, PromptMaker
from vllm_longmamba.summarize.records import Completion
from vllm_longmamba.summarize.runner import Admitted, Runner
from vllm_longmamba.summarize.settings import Fit, JobSettings
from vllm_longmamba.summarize.store import Store
from vllm_longmamba.summarize.texts import TextExtractor

from .documents import stored_rows, write_jsonl
from .stub_server import ENDLESS, ODD_ANSWERS, StubServer, answer

KILLS = 50
FEW_KILLS = 5
CONCURRENCY = 8
SERVER_DELAY_S = 0.01
TIMEOUT_S = 5.0


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
    context.set_forkserver_preload(["vllm_longmamba.summarize.job", "vllm_longmamba.summarize.server", __name__])
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
    """After a kill: no id twice in the store, and an output of whole rows only."""
    ids = [row["id"] for row in stored_rows(output)]
    assert len(set(ids)) == len(ids)
    if output.exists():
        assert rows_of(output).keys() <= set(ids)


def rows_of(output: Path) -> dict[str, str | None]:
    """Summary by id; no id may come twice."""
    if output.suffix == ".parquet":
        rows = pq.read_table(output).to_pylist()
    else:
        rows = [json.loads(line) for line in output.read_text().splitlines()]
    found = {row["id"]: row["summary"] for row in rows}
    assert len(found) == len(rows)
    return found


# What stopped or swallowed a job once: each of them must become one error row.
BAD_FILES = {
    "paragraphs.html": "<p>x</p>" * 100_000 + "REFUSE",
    "deep.html": "<div>" * 30_000,
    "tables.html": "<table><tr><td>" * 5000,
    "comments.html": "<!--" * 100_000,
    "torn.pdf": "%PDF-1.4 nonsense",
    "blank.txt": " ",
}


def write_bad_inputs(folder: Path) -> set[str]:
    """The bad inputs of a folder; the ids of their error rows."""
    folder.mkdir(parents=True)
    for name, content in BAD_FILES.items():
        (folder / name).write_text(content)
    os.mkfifo(folder / "pipe.txt")
    (folder / "zero.jsonl").symlink_to("/dev/zero")
    (folder / "loop.txt").symlink_to(folder / "loop.txt")
    (folder / "gone.md").symlink_to(folder / "nowhere")
    (folder / "latin.txt").write_bytes(b"\xff")
    (folder / "torn.txt.gz").write_bytes(gzip.compress(os.urandom(5000))[:3000])
    (folder / "bomb.txt.gz").write_bytes(gzip.compress(bytes(10_000_000)))
    names = [path.name for path in folder.iterdir()]
    broken = pa.array([b"\xff\xfe", b"x" * 2_000_000], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"id": ["utf8", "long"], "text": broken}), folder / "rows.parquet")
    shared = pa.DictionaryArray.from_arrays([0] * 64, ["x" * 60_000_000])
    pq.write_table(pa.table({"text": shared}), folder / "shared.parquet", compression="zstd")
    words = ["FORBIDDEN", "QUOTA", "ALWAYS-429", "ALWAYS-500", "REFUSE", *ENDLESS, *ODD_ANSWERS]
    rows = [b"{torn\n", b"[1]\n", b"[" * 200_000 + b"\n", {"id": "none"}, {"id": "surrogate", "text": "\ud800"}]
    write_jsonl(folder / "bad.jsonl", rows + [{"id": word, "text": f"{word} "} for word in words])
    lines = {f"{folder}/bad.jsonl#{number}" for number in (1, 2, 3)} | {"none", "surrogate", "utf8", "long", *words}
    shared_rows = {f"{folder}/shared.parquet#{number}" for number in range(1, 65)}
    return {f"{folder}/{name}" for name in names} | lines | shared_rows


def run_bad(folder: str, output: str, url: str) -> None:
    """One attempt of the job over good and bad inputs."""
    server._PAUSE = tenacity.wait_random(0.001, 0.01)
    settings = JobSettings(
        inputs=(f"{folder}/in",),
        output=Path(folder) / output,
        base_url=url,
        prompt_kind="base",
        concurrency=CONCURRENCY,
        timeout_s=TIMEOUT_S,
        retry_for_s=0.5,
        max_bytes=1_000_000,
    )
    code = run_job(settings, Console(file=io.StringIO()))
    (Path(folder) / "peak").write_text(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
    raise SystemExit(code)


@pytest.mark.parametrize("output", ["out.jsonl", pytest.param("out.parquet", marks=pytest.mark.slow)])
def test_kills_among_bad_inputs(tmp_path: Path, output: str) -> None:
    """Every good document is answered once, every bad one is an error row, and nothing hangs or swells."""
    count, kills = 200, 8
    bad = write_bad_inputs(tmp_path / "in" / "bad")
    good = [{"id": f"r{number}", "text": f"text {number}"} for number in range(count)]
    write_jsonl(tmp_path / "in" / "a.jsonl", good[: count // 2])
    write_jsonl(tmp_path / "in" / "z.jsonl", good[count // 2 :])
    rng = random.Random(output)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vllm_longmamba.summarize.job", "vllm_longmamba.summarize.server", __name__])
    with StubServer(delay_s=SERVER_DELAY_S) as stub:
        for _ in range(kills):
            attempt = context.Process(target=run_bad, args=(str(tmp_path), output, stub.url))
            attempt.start()
            attempt.join(rng.uniform(0.3, 3.0))
            if attempt.is_alive():
                attempt.kill()
            attempt.join()
            check_half_done(tmp_path / output)
        last = context.Process(target=run_bad, args=(str(tmp_path), output, stub.url))
        last.start()
        last.join(120)
        asked = stub.requests
    assert last.exitcode == 3
    found = rows_of(tmp_path / output)
    assert {name for name, summary in found.items() if summary is None} == bad
    assert found.keys() - bad == {row["id"] for row in good}
    for row in good:
        assert found[row["id"]] == answer(f"{row['text']}\n\nTL;DR:")
    assert sum(asked[f"{row['text']}\n\nTL;DR:"] for row in good) <= count + kills * CONCURRENCY
    assert int((tmp_path / "peak").read_text()) < 1_000_000


class InstantBackend:
    """Answers without a server."""

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


def run_large(folder: str) -> None:
    """A job over large documents; its memory."""
    runner._BYTES_UNDER_WAY = 8 * 2**20
    settings = JobSettings(inputs=(f"{folder}/in",), output=Path(folder) / "out.jsonl", model="m")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    asyncio.run(run_instantly(settings, Progress(Console(file=io.StringIO()))))
    (Path(folder) / "grown").write_text(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))


async def run_instantly(settings: JobSettings, progress: Progress) -> None:
    """A job whose prompts are answered at once."""
    with closing(Store(settings.output, {})) as store:
        admitted = admitted_records(settings, Inputs(settings.inputs), store, progress)
        answerer = Answerer(PromptMaker(False, None, None, None), Fit(), 10, None)
        assert await Runner(admitted, answerer, TextExtractor(), InstantBackend(), store, progress).run()


def test_large_documents_are_let_go(tmp_path: Path) -> None:
    """Idle workers keep nothing of the documents that they were given: 2.1 GB of 70 documents of 40 MB, once."""
    (tmp_path / "in").mkdir()
    for number in range(60):
        (tmp_path / "in" / f"{number}.txt").write_text(f"{number} " + "x" * 4_000_000)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vllm_longmamba.summarize.job", __name__])
    process = context.Process(target=run_large, args=(str(tmp_path),))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert int((tmp_path / "grown").read_text()) < 100_000


@pytest.mark.slow
def test_memory_is_flat(tmp_path: Path) -> None:
    """100,000 small records: the last 80,000 add next to nothing to what the first 20,000 took. Prints their rate."""
    count, first = 100_000, 20_000
    write_jsonl(tmp_path / "in.jsonl", ({"id": f"record-{n}", "text": f"text {n} " * 20} for n in range(count)))
    progress = Progress(Console(file=io.StringIO()))
    settings = JobSettings(inputs=(str(tmp_path / "in.jsonl"),), output=tmp_path / "out.jsonl", model="m")
    store = Store(settings.output, {})
    sizes: dict[int, int] = {}
    times: dict[int, float] = {}

    def watched() -> Iterator[Admitted]:
        for admitted in admitted_records(settings, Inputs(settings.inputs), store, progress):
            if admitted.number % first in (0, 1):
                sizes[admitted.number] = resident_bytes()
                times[admitted.number] = time.monotonic()
            yield admitted

    async def run_all() -> bool:
        backend = InstantBackend()
        answerer = Answerer(PromptMaker(False, None, None, None), Fit(), 10, None)
        return await Runner(watched(), answerer, TextExtractor(), backend, store, progress).run()

    assert asyncio.run(run_all())
    store.export()
    store.close()
    assert progress.counts["rows"] == count
    with (tmp_path / "out.jsonl").open("rb") as lines:
        assert sum(1 for _ in lines) == count
    for number in range(first, count + 1, first):
        print(f"to {number}: {first / (times[number] - times[number - first + 1]):.0f} records/s")
    grown = sizes[count] - sizes[first]
    print(f"{grown / 2**20:.1f} MiB more after {count - first} records, pid {os.getpid()}")
    # The page cache of the index may fill up to 8 MiB; nothing else may grow.
    assert grown < 12 * 2**20
