"""The store beside an output: nothing lost, nothing twice, never half a row, and no file of others touched."""

import json
import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from vllm_longmamba.summarize.records import COLUMNS, Row
from vllm_longmamba.summarize.store import Store, Verdict

SETTINGS: dict[str, Any] = {"max_tokens": 5}


@pytest.fixture(params=["out.jsonl", "out.parquet"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / str(request.param)


def row(record_id: str, summary: str = "s", content_hash: str = "h", error: str | None = None) -> Row:
    return Row(record_id, summary, error=error, hash=content_hash)


def write(output: Path, *rows: Row, **more: Any) -> None:
    store = Store(output, SETTINGS, **more)
    for each in rows:
        store.put(each)
    store.begin()
    store.export()
    store.close()


def summaries(output: Path) -> list[tuple[str, str]]:
    found: list[dict[str, Any]]
    if output.suffix == ".parquet":
        found = pq.read_table(output).to_pylist()
    else:
        found = [json.loads(line) for line in output.read_text().splitlines()]
    assert all(tuple(each) == COLUMNS for each in found)
    return [(each["id"], each["summary"]) for each in found]


def test_rows_in_the_order_of_their_answers(output: Path) -> None:
    write(output, row("\xfc\n", "tab\t"), row("b", "\ud800"), row("c"))
    write(output, row("b", "2"), row("d"))
    assert summaries(output) == [("\xfc\n", "tab\t"), ("c", "s"), ("b", "2"), ("d", "s")]
    assert sorted(os.listdir(output.parent)) == [output.name, f"{output.name}.db"]


def test_verdicts(output: Path) -> None:
    write(output, row("a", content_hash="1"), row("b", content_hash="1"))
    store = Store(output, SETTINGS)
    asked = [("a", "1"), ("b", "2"), ("b", "2"), ("b", "1"), ("c", "1"), ("c", "1"), ("c", "2")]
    verdicts = [store.admit(*each) for each in asked]
    store.close()
    new, repeated, clashing = Verdict.NEW, Verdict.REPEATED, Verdict.CLASHING
    assert verdicts == [Verdict.DONE, new, repeated, clashing, new, repeated, clashing]


def test_what_is_forgotten(output: Path) -> None:
    write(output, row("a"), row("b", error="empty: x"))
    write(output, retry_errors=True)
    assert summaries(output) == [("a", "s")]
    write(output, overwrite=True)
    assert summaries(output) == []


def test_one_job_at_a_time(output: Path) -> None:
    store = Store(output, SETTINGS)
    with pytest.raises(ValueError, match="being written by another job"):
        Store(output, SETTINGS)
    store.close()
    Store(output, SETTINGS).close()


FOREIGN = [b'{"precious":1}', b"", b'{"id": "a", "hash": "h", "error": null}\n', b"PAR1"]


@pytest.mark.parametrize("content", FOREIGN)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_foreign_output_stays(output: Path, content: bytes, overwrite: bool) -> None:
    output.write_bytes(content)
    with pytest.raises(ValueError, match=r"was not written by a job of `longmamba summarize` .* move it away"):
        Store(output, SETTINGS, overwrite=overwrite)
    assert output.read_bytes() == content
    assert os.listdir(output.parent) == [output.name]


@pytest.mark.parametrize("content", FOREIGN)
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_that_others_changed_stays(output: Path, content: bytes, overwrite: bool) -> None:
    """Before the job, and while it runs."""
    write(output, row("a"))
    output.write_bytes(content)
    with pytest.raises(ValueError, match=r"is not as this job has written it, and stays as it is; move it away"):
        Store(output, SETTINGS, overwrite=overwrite)
    output.unlink()
    store = Store(output, SETTINGS)
    output.write_bytes(content)
    with pytest.raises(ValueError, match="is not as this job has written it"):
        store.export()
    assert output.read_bytes() == content
    output.unlink()
    store.export()
    store.close()
    assert summaries(output) == [("a", "s")]


def test_a_copy_is_recognized(output: Path, tmp_path: Path) -> None:
    """By its content, wherever it was moved with its store."""
    write(output, row("a"))
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in (output.name, f"{output.name}.db"):
        (moved / name).write_bytes((tmp_path / name).read_bytes())
    write(moved / output.name, row("b"))
    assert [name for name, _ in summaries(moved / output.name)] == ["a", "b"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_foreign_file_in_the_place_of_the_store(output: Path, overwrite: bool) -> None:
    store = output.with_name(f"{output.name}.db")
    store.write_bytes(b"precious " * 1000)
    with pytest.raises(ValueError, match="is no store of `longmamba summarize`"):
        Store(output, SETTINGS, overwrite=overwrite)
    assert store.read_bytes() == b"precious " * 1000
    store.unlink()
    with sqlite3.connect(store) as database:
        database.execute("CREATE TABLE precious (x)")
    database.close()
    before = store.read_bytes()
    with pytest.raises(ValueError, match="is no store of `longmamba summarize`"):
        Store(output, SETTINGS, overwrite=overwrite)
    assert store.read_bytes() == before


def test_a_job_of_the_earlier_version(output: Path) -> None:
    output.with_name(f"{output.name}.job.json").write_text("{}")
    output.write_text("rows")
    with pytest.raises(ValueError, match=r"was not written by a job .* choose another output, or move it away"):
        Store(output, SETTINGS)
    assert output.read_text() == "rows"


def test_other_settings(output: Path) -> None:
    Store(output, {"max_tokens": 1}).close()
    write(output, row("a"))
    with pytest.raises(ValueError, match=r"begun with other settings \(max_tokens was 5, is 6\); resume with"):
        Store(output, {"max_tokens": 6})
    Store(output, {"max_tokens": 6}, overwrite=True).close()


def test_reading_only(output: Path) -> None:
    """What a dry run does: it changes nothing, also while a job runs."""
    store = Store(output)
    assert store.admit("a", "h") is Verdict.NEW
    store.close()
    assert os.listdir(output.parent) == []
    job = Store(output, SETTINGS)
    job.put(row("a"))
    store = Store(output)
    assert store.admit("a", "h") is Verdict.DONE
    store.close()
    job.put(row("b", error="empty: x"))
    job.close()
    for again, verdict in ((False, Verdict.DONE), (True, Verdict.NEW)):
        store = Store(output, retry_errors=again)
        assert [store.admit(name, "h") for name in ("a", "b")] == [Verdict.DONE, verdict]
        store.close()
    assert os.listdir(output.parent) == [f"{output.name}.db"]


def test_an_export_that_fails_changes_nothing(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(output, row("a"))
    before = output.read_bytes()

    def broken(path: Path, rows: Iterator[str]) -> None:
        path.write_text("half")
        raise ValueError("broken")

    monkeypatch.setitem(sys.modules["vllm_longmamba.summarize.store"].WRITERS, output.suffix, broken)
    store = Store(output, SETTINGS)
    with pytest.raises(ValueError, match="broken"):
        store.export()
    store.close()
    assert output.read_bytes() == before
    assert sorted(os.listdir(output.parent)) == [output.name, f"{output.name}.db"]


def test_what_a_killed_export_left(output: Path) -> None:
    """It is replaced, and if it is a link, what it leads to stays."""
    precious = output.with_name("precious")
    precious.write_text("precious")
    output.with_name(f".{output.name}.longmamba.tmp").symlink_to(precious)
    write(output, row("a"))
    assert summaries(output) == [("a", "s")]
    assert precious.read_text() == "precious"


def test_rows_come_while_it_exports(output: Path) -> None:
    store = Store(output, SETTINGS)
    exporting = threading.Thread(target=lambda: [store.export() for _ in range(5)])
    exporting.start()
    written = 0
    while exporting.is_alive():
        store.put(row(str(written)))
        written += 1
    exporting.join()
    store.export()
    store.close()
    assert [name for name, _ in summaries(output)] == [str(number) for number in range(written)]


LIMITED = """
import resource, sys
from pathlib import Path
from vllm_longmamba.summarize.records import DiskFullError, Row
from vllm_longmamba.summarize.store import Store
store = Store(Path(sys.argv[1]), {"max_tokens": 5})
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
for number in range(1000):
    try:
        store.put(Row(str(number), "x" * 1000))
    except DiskFullError as error:
        print(number, error)
        break
"""


def test_no_room_for_a_row(output: Path) -> None:
    ran = subprocess.run([sys.executable, "-c", LIMITED, output], capture_output=True, text=True, check=True)
    number, _, message = ran.stdout.partition(" ")
    assert "cannot write" in message
    assert 1 < int(number) < 1000
    write(output)
    assert [name for name, _ in summaries(output)] == [str(written) for written in range(int(number))]
