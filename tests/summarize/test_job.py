"""Whole jobs against a stub server: resuming, bad records, formats, interrupts, a full disk."""

import gzip
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import tenacity

from vllm_longmamba.summarize import runner, server
from vllm_longmamba.summarize.job import EXIT_DISK_FULL, EXIT_ERROR_ROWS, EXIT_INTERRUPTED, EXIT_STOPPED
from vllm_longmamba.summarize.records import COLUMNS
from vllm_longmamba.summarize.settings import Sampling
from vllm_longmamba.summarize.store import Store

from .conftest import Job
from .documents import pdf, write_jsonl
from .stub_server import answer


def rows(count: int, first: int = 0) -> list[dict[str, str]]:
    return [{"id": f"r{number}", "text": f"text of row {number}"} for number in range(first, first + count)]


def expected(count: int) -> dict[str, str]:
    return {row["id"]: answer(f"{row['text']}\n\nTL;DR:") for row in rows(count)}


def test_every_format(job: Job) -> None:
    folder = job.folder / "in"
    write_jsonl(folder / "rows.jsonl.zst", rows(3))
    (folder / "a.txt").write_text("plain text here")
    (folder / "b.md.gz").write_bytes(gzip.compress(b"# a heading"))
    (folder / "c.html").write_text("<p>from a page</p>")
    (folder / "d.pdf").write_bytes(pdf(["from a PDF"]))
    assert job() == 0
    files = {"a.txt": "plain text here", "b.md.gz": "# a heading", "c.html": "from a page", "d.pdf": "from a PDF"}
    assert job.answers() == expected(3) | {
        str(folder / name): answer(f"{text}\n\nTL;DR:") for name, text in files.items()
    }
    row = job.rows()[0]
    assert tuple(row) == COLUMNS
    assert (row["prompt_tokens"], row["output_tokens"]) != (0, 0)
    assert (row["finish_reason"], row["error"], row["steps"]) == ("stop", None, None)
    assert row["seconds"] > 0


def test_bad_records_are_error_rows(job: Job) -> None:
    folder = job.folder / "in"
    write_jsonl(
        folder / "rows.jsonl", [*rows(2), b"{torn\n", {"id": "no text"}, {"id": "r0", "text": "other"}, *rows(1)]
    )
    (folder / "a.txt").write_bytes(b"\xff\xff")
    (folder / "b.pdf").write_bytes(b"%PDF-1.4 broken")
    (folder / "c.txt").write_text("REFUSE this")
    (folder / "d.txt.gz").write_bytes(gzip.compress(os.urandom(5000))[:3000])
    assert job() == EXIT_ERROR_ROWS
    found = job.answers()
    rows_file = folder / "rows.jsonl"
    kinds = {name: error.partition(":")[0] for name, error in found.items() if name not in ("r0", "r1")}
    assert kinds == {
        f"{rows_file}#3": "bad row",
        "no text": "bad row",
        f"r0 ({rows_file}#5)": "duplicate id",
        str(folder / "a.txt"): "unreadable",
        str(folder / "b.pdf"): "unreadable",
        str(folder / "c.txt"): "refused",
        str(folder / "d.txt.gz"): "unreadable",
    }
    assert {name: found[name] for name in ("r0", "r1")} == expected(2)
    assert "7 error rows: 3 unreadable, 2 bad row, 1 " in job.said
    assert "1 left out: the same id and text once more" in job.said


def test_resume_skips_what_is_done(job: Job) -> None:
    write_jsonl(job.folder / "in" / "rows.jsonl", rows(5))
    assert job(limit=3) == 0
    assert job.answers() == expected(3)
    assert job() == 0
    assert "2 rows written" in job.said
    assert "3 done before" in job.said
    assert job.answers() == expected(5)
    assert max(job.server.requests.values()) == 1
    job.server.stop()
    # Nothing to do: the server is not even asked.
    assert job() == 0
    assert "0 rows written" in job.said


def test_changed_content_is_answered_anew(job: Job) -> None:
    path = job.folder / "in" / "rows.jsonl"
    write_jsonl(path, rows(4))
    job()
    changed = {"id": "r1", "text": "a new text"}
    write_jsonl(path, [rows(4)[0], changed, *rows(2, first=2)])
    assert job() == 0
    assert "1 rows written" in job.said
    assert job.answers() == expected(4) | {"r1": answer("a new text\n\nTL;DR:")}


@pytest.mark.parametrize("output", ["out.jsonl", "out.parquet"])
def test_error_rows_stay_until_asked_for(job: Job, output: str) -> None:
    (job.folder / "in").mkdir()
    document = job.folder / "in" / "a.txt"
    document.write_text("fine")
    broken = job.folder / "in" / "b.txt"
    broken.write_bytes(b"\xff")
    assert job(output=output) == EXIT_ERROR_ROWS
    assert job(output=output) == EXIT_ERROR_ROWS
    assert "0 rows written" in job.said
    assert "it has 1 error rows; --retry-errors tries them again" in job.said
    assert job(output=output, retry_errors=True) == EXIT_ERROR_ROWS
    assert "1 rows written" in job.said
    broken.write_text("repaired")
    assert job(output=output) == 0
    assert job.answers(output) == {
        str(document): answer("fine\n\nTL;DR:"),
        str(broken): answer("repaired\n\nTL;DR:"),
    }


def test_other_settings_are_refused(job: Job) -> None:
    write_jsonl(job.folder / "in" / "rows.jsonl", rows(2))
    job()
    before = (job.folder / "out.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"begun with other settings \(max_tokens was 256, is 7\); resume with"):
        job(sampling=Sampling(max_tokens=7))
    assert (job.folder / "out.jsonl").read_bytes() == before
    assert job(instruction="Who?", overwrite=True) == 0
    assert job.answers()["r0"] == answer("text of row 0\n\nWho?")


@pytest.mark.parametrize("again", ["overwrite", "retry_errors"])
def test_rows_stay_until_there_are_new_ones(job: Job, again: str) -> None:
    """Beginning anew with a wrong input, a wrong model, or a server that is away costs no row."""
    write_jsonl(job.folder / "in" / "rows.jsonl", [*rows(3), {"id": "bad"}])
    assert job() == EXIT_ERROR_ROWS
    before = job.stored()
    with pytest.raises(ValueError, match="no such file or folder"):
        job(job.folder / "typo", **{again: True})
    assert job(base_url="http://127.0.0.1:9/v1", retry_for_s=0.1, **{again: True}) == EXIT_STOPPED
    if again == "overwrite":
        assert job(model="other", overwrite=True) == EXIT_STOPPED
    assert job.stored() == job.answers() == before
    assert job(**{again: True}) == EXIT_ERROR_ROWS
    assert f"{4 if again == 'overwrite' else 1} rows written" in job.said
    assert job.answers() == before


def test_the_way_of_running_may_change(job: Job) -> None:
    write_jsonl(job.folder / "in" / "rows.jsonl", rows(4))
    assert job(limit=2, concurrency=3) == 0
    assert job(concurrency=1, engine={"max_num_seqs": 4}, retry_for_s=3.0) == 0
    assert job.answers() == expected(4)


def test_parquet(job: Job) -> None:
    write_jsonl(job.folder / "in" / "rows.jsonl", rows(300))
    assert job(output="out.parquet", limit=100) == 0
    assert job.answers("out.parquet") == expected(100)
    assert job(output="out.parquet") == 0
    assert job.answers("out.parquet") == expected(300)
    assert pq.read_schema(job.folder / "out.parquet").names == list(COLUMNS)
    left = sorted(path.name for path in job.folder.iterdir())
    assert left == ["in", "out.parquet", "out.parquet.db"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_no_output_of_ours(job: Job, overwrite: bool) -> None:
    """The whole command that once left a foreign file with 0 bytes."""
    write_jsonl(job.folder / "in" / "rows.jsonl", rows(2))
    (job.folder / "out.jsonl").write_text('{"precious":1}')
    with pytest.raises(ValueError, match="was not written by a job of `longmamba summarize`"):
        job(overwrite=overwrite)
    assert (job.folder / "out.jsonl").read_text() == '{"precious":1}'
    assert job.server.requests.total() == 0
    with pytest.raises(ValueError, match=r"must end with \.jsonl"):
        job(output="out.csv")


def test_rows_appear_while_it_runs(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_SYNC_SECONDS", 0.05)
    monkeypatch.setattr(runner, "_EXPORT_SECONDS", 0.05)
    write_jsonl(job.folder / "in" / "rows.jsonl", rows(60))
    seen: list[int] = []

    def watch() -> None:
        output = job.folder / "out.jsonl"
        wait_for(job, 10)
        job.server.delay_s = 0.02
        while not seen or seen[-1] < 60:
            seen.append(output.read_bytes().count(b"\n") if output.exists() else 0)
            time.sleep(0.01)

    job.server.delay_s = 0.02
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    assert job(concurrency=1) == 0
    watcher.join(30)
    assert any(0 < rows < 60 for rows in seen)
    assert seen == sorted(seen)


def test_documents_under_way_have_a_limit_of_bytes(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of these fit beside each other; one that is larger than the limit goes alone."""
    monkeypatch.setattr(runner, "_BYTES_UNDER_WAY", 2500)
    job.server.delay_s = 0.02
    records = [{"id": f"x{number}", "text": "x" * 1000} for number in range(20)]
    write_jsonl(job.folder / "in" / "rows.jsonl", [*records, {"id": "large", "text": "y" * 5000}, *rows(3)])
    assert job(concurrency=16) == 0
    assert len(job.answers()) == 24
    # The three short ones at the end fit together.
    assert job.server.most_at_once == 3


def test_names_that_look_like_markup(job: Job) -> None:
    write_jsonl(job.folder / "in" / "rows.jsonl", rows(2))
    assert job(output="sum[bold]:smile:.jsonl") == 0
    assert f"complete: {job.folder}/sum[bold]:smile:.jsonl" in job.said
    assert len(job.rows("sum[bold]:smile:.jsonl")) == 2
    job.server.models = b'{"data": [{"id": "[/red]"}]}'
    with pytest.raises(ValueError, match="another"):
        job(output="sum[bold]:smile:.jsonl", encoding="latin-1")
    assert job(output="b.jsonl", model="x", retry_for_s=0.1) == EXIT_STOPPED
    assert "has no model 'x', but [/red]; see --model" in job.said


def test_one_document_stops_no_job(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record that the server refuses, or answers with nonsense, is one error row; and so it is when asked again."""
    monkeypatch.setattr(server, "_PAUSE", tenacity.wait_random(0.001, 0.01))
    bad = ["FORBIDDEN", "QUOTA", "ODD-HTML ", "ODD-NULL-CHOICE ", "ODD-USAGE-STRING ", "ODD-NO-CHOICES "]
    records = rows(20)
    for number, word in enumerate(bad):
        records.insert(3 * number, {"id": word.strip(), "text": f"{word} text"})
    write_jsonl(job.folder / "in" / "rows.jsonl", records)
    for retry in (False, True):
        assert job(concurrency=2, retry_errors=retry) == EXIT_ERROR_ROWS
        found = job.answers()
        assert {name: found[name] for name in expected(20)} == expected(20)
        kinds = {name.strip(): found[name.strip()].partition(":")[0] for name in bad}
        assert kinds == dict.fromkeys(["FORBIDDEN", "QUOTA"], "refused") | dict.fromkeys(
            ["ODD-HTML", "ODD-NULL-CHOICE", "ODD-USAGE-STRING", "ODD-NO-CHOICES"], "bad answer"
        )


def test_a_key_that_is_refused_for_all(job: Job) -> None:
    """Nothing is written, so that nothing has to be tried again by name."""
    write_jsonl(job.folder / "in" / "rows.jsonl", rows(20))
    job.server.refuses = 401
    assert job(api_key="sk-secret") == EXIT_STOPPED
    assert f"stopped: {job.server.url} answers nothing any more: 401 Unauthorized" in job.said
    assert "sk-secret" not in job.said
    assert job.rows() == []
    job.server.refuses = None
    assert job() == 0
    assert job.answers() == expected(20)


def test_the_server_goes_away_for_good(job: Job) -> None:
    job.server.delay_s = 0.02
    write_jsonl(job.folder / "in" / "rows.jsonl", rows(60))
    stopper = threading.Thread(target=lambda: (wait_for(job, 20), job.server.stop()))
    stopper.start()
    assert job(concurrency=4, retry_for_s=0.3) == EXIT_STOPPED
    stopper.join()
    assert "The same command goes on from here." in job.said
    done = job.answers()
    assert 10 < len(done) < 60
    assert done.items() <= expected(60).items()


def wait_for(job: Job, requests: int) -> None:
    deadline = time.monotonic() + 30
    while sum(job.server.requests.values()) < requests and time.monotonic() < deadline:
        time.sleep(0.002)


@pytest.mark.parametrize("interrupts", [1, 2])
def test_interrupts(job: Job, interrupts: int) -> None:
    """The first finishes what is under way, the second drops it."""
    count, concurrency = 40, 6
    job.server.delay_s = 0.3
    write_jsonl(job.folder / "in" / "rows.jsonl", rows(count))

    def interrupt() -> None:
        wait_for(job, 2 * concurrency)
        for _ in range(interrupts):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert job(concurrency=concurrency, output="out.parquet") == EXIT_INTERRUPTED
    thread.join()
    done = job.answers("out.parquet")
    asked = len(job.server.requests)
    assert len(done) == asked if interrupts == 1 else len(done) < asked
    assert ("given up while under way" in job.said) == (interrupts == 2)
    job.server.delay_s = 0.0
    assert job(output="out.parquet") == 0
    assert job.answers("out.parquet") == expected(count)
    again = sum(job.server.requests.values()) - count
    assert again == 0 if interrupts == 1 else 0 < again <= concurrency


def test_an_interrupt_at_the_end(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows are there: the output is written all the same."""
    write_jsonl(job.folder / "in" / "rows.jsonl", rows(5))
    export = Store.export

    def interrupted_export(store: Store) -> None:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
        export(store)

    monkeypatch.setattr(Store, "export", interrupted_export)
    assert job() == 0
    assert job.answers() == expected(5)


def test_an_interrupt_before_the_first_document(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is enough, also while nothing comes from standard input."""
    reading, writing = os.pipe()
    ended = threading.Event()

    def interrupt() -> None:
        time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGINT)
        # Or the job would wait for ever.
        job_ended.append(ended.wait(5.0))
        os.close(writing)

    job_ended: list[bool] = []
    thread = threading.Thread(target=interrupt)
    with open(reading) as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        thread.start()
        code = job(Path("-"))
        ended.set()
        thread.join()
    assert (code, job_ended) == (EXIT_INTERRUPTED, [True])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 512 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.parametrize("output", ["disk/out.jsonl", "disk/out.parquet"])
def test_disk_full(job: Job, small_disk: Path, output: str) -> None:
    count = 300
    write_jsonl(job.folder / "in" / "rows.jsonl", rows(count))
    assert job(output=output, concurrency=4) == EXIT_DISK_FULL
    assert "disk full: cannot write" in job.said
    assert "Make room; then the same command goes on from here." in job.said
    done = job.stored(output)
    assert 20 < len(done) < count
    assert done.items() <= expected(count).items()
    # Still full: nothing is lost by trying.
    assert job(output=output, concurrency=4) == EXIT_DISK_FULL
    assert job.stored(output).items() >= done.items()
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    assert job(output=output) == 0
    assert job.answers(output) == expected(count)


def test_disk_full_at_the_end(job: Job, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows have room, but not the parquet file beside them."""
    count = 20
    write_jsonl(job.folder / "in" / "rows.jsonl", rows(count))
    export = Store.export

    def fill_the_disk(store: Store) -> None:
        with suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))
        export(store)

    monkeypatch.setattr(Store, "export", fill_the_disk)
    assert job(output="disk/out.parquet") == EXIT_DISK_FULL
    monkeypatch.undo()
    assert len(job.stored("disk/out.parquet")) == count
    assert {path.name.partition("-")[0] for path in small_disk.iterdir()} == {"filler", "out.parquet.db"}
    (small_disk / "filler").unlink()
    assert job(output="disk/out.parquet") == 0
    assert max(job.server.requests.values()) == 1
    assert job.answers("disk/out.parquet") == expected(count)
