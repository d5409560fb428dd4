"""The output file: nothing lost, nothing twice, never half a row."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_longmamba.summarize.index import Index, Verdict
from vllm_longmamba.summarize.journal import Journal, read_rows
from vllm_longmamba.summarize.records import Row


def row(record_id: str, summary: str = "s", content_hash: str = "h", error: str | None = None) -> Row:
    return Row(record_id, content_hash, summary, error=error)


def ids(path: Path) -> list[str]:
    return [found["id"] for found in read_rows(path)]


def write(path: Path, *rows: Row) -> None:
    journal = Journal(path)
    for each in rows:
        journal.append(each)
    journal.close()


def test_rows_are_whole_at_once(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "out.jsonl")
    for number in range(3):
        journal.append(row(f"ü{number}\n", "tab\t"))
        assert ids(journal.path) == [f"ü{other}\n" for other in range(number + 1)]
    journal.close()
    journal.close()


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_a_torn_last_line_is_cut_off(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "out.jsonl"
    write(path, row("a"), row("b"))
    os.truncate(path, path.stat().st_size - cut)
    index = Index()
    journal = Journal(path)
    assert journal.load(index) == 1
    journal.append(row("c"))
    journal.close()
    assert ids(path) == ["a", "c"]


@pytest.mark.parametrize("content", ["text\n", "[]\n", '{"id": "a"}\n', '{"id": 1, "hash": "", "error": null}\n'])
def test_another_file_is_refused_and_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match="line 1: not a row of `longmamba summarize`"):
        Journal(path)
    assert path.read_text() == content


def test_one_job_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    first = Journal(path)
    with pytest.raises(ValueError, match="being written by another job"):
        Journal(path)
    first.replace([row("a").to_dict()])
    with pytest.raises(ValueError, match="being written by another job"):
        Journal(path)
    first.close()
    Journal(path).close()


def test_later_rows_win(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    journal = Journal(path)
    for each in (row("a", "1"), row("b", "1"), row("c", "1")):
        journal.append(each)
    journal.append(row("a", "2"), replaces=True)
    journal.append(row("a", "3"), replaces=True)
    journal.compact()
    journal.append(row("d", "1"))
    journal.close()
    assert [(found["id"], found["summary"]) for found in read_rows(path)] == [
        ("b", "1"),
        ("c", "1"),
        ("a", "3"),
        ("d", "1"),
    ]
    # A job that was killed before it could compact: the next one does.
    write(path, row("b", "2"))
    index = Index()
    journal = Journal(path)
    assert journal.load(index) == 4
    journal.close()
    assert ids(path) == ["c", "a", "d", "b"]


def test_error_rows_can_be_dropped(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    write(path, row("a"), row("b", error="empty: x"), row("c"))
    for drop, expected in ((False, ["a", "b", "c"]), (True, ["a", "c"])):
        journal = Journal(path)
        assert journal.load(Index(), drop_errors=drop) == len(expected)
        journal.close()
        assert ids(path) == expected


def test_replace_that_fails_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    write(path, row("a"))
    journal = Journal(path)
    with pytest.raises(TypeError):
        journal.replace(iter([{"id": object(), "error": None}]))
    journal.append(row("b"))
    journal.close()
    assert ids(path) == ["a", "b"]
    assert sorted(os.listdir(tmp_path)) == ["out.jsonl"]


LIMITED = """
import resource, sys
from pathlib import Path
from vllm_longmamba.summarize.journal import DiskFullError, Journal
from vllm_longmamba.summarize.records import Row
journal = Journal(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
for number in range(100):
    try:
        journal.append(Row(str(number), "h", "x" * 100))
    except DiskFullError as error:
        print(number, error)
        break
journal.close()
"""


def test_no_room_for_a_row(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    ran = subprocess.run([sys.executable, "-c", LIMITED, path], capture_output=True, text=True, check=True)
    number, _, message = ran.stdout.partition(" ")
    assert "cannot write" in message
    assert 1 <= int(number) <= 5
    assert ids(path) == [str(written) for written in range(int(number))]
    assert path.read_bytes().endswith(b"}\n")


def test_index() -> None:
    index = Index()
    assert [index.add("a", "1"), index.add("b", "1"), index.add("a", "2")] == [False, False, True]
    asked = [("a", "2"), ("b", "2"), ("b", "2"), ("b", "1"), ("c", "1"), ("c", "1"), ("c", "2")]
    assert [index.admit(*each) for each in asked] == [
        Verdict.DONE,
        Verdict.CHANGED,
        Verdict.REPEATED,
        Verdict.CLASHING,
        Verdict.NEW,
        Verdict.REPEATED,
        Verdict.CLASHING,
    ]
    index.close()
