"""Which records the input files give."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vllm_longmamba.summarize.inputs import InputFile, Inputs
from vllm_longmamba.summarize.records import Record
from vllm_longmamba.summarize.settings import JobSettings
from vllm_longmamba.summarize.sources import read_records

from .documents import compressed, write_jsonl


def records(*given: Path | str, **options: Any) -> list[Record]:
    names = tuple(str(name) for name in given)
    settings = JobSettings(inputs=names, output=Path("out.jsonl"), model="m", **options)
    return list(read_records(Inputs(names), settings))


def by_id(found: list[Record]) -> dict[str, Any]:
    return {record.id: record.error or record.content for record in found}


def test_folder_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("b/2.txt", "b/1.MD", "a.html", "c.pdf", ".hidden.txt", ".git/x.txt", "notes.docx", "z.txt.gz"):
        path = Path("in") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(compressed(name.encode(), path.suffix))
    found = records("in")
    assert [(record.id, record.kind) for record in found] == [
        ("in/a.html", "html"),
        ("in/c.pdf", "pdf"),
        ("in/z.txt.gz", "text"),
        ("in/b/1.MD", "text"),
        ("in/b/2.txt", "text"),
    ]
    assert [record.content for record in found] == [b"a.html", b"c.pdf", b"z.txt.gz", b"b/1.MD", b"b/2.txt"]
    assert sum(record.weight for record in found) == Inputs(["in"]).total_bytes
    assert [record.id for record in records("in/**/*.txt", "in/b/1.MD")] == ["in/b/2.txt", "in/b/1.MD"]


def test_the_output_is_no_input(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "out.jsonl", [{"text": "answer"}])
    write_jsonl(tmp_path / "in.jsonl", [{"text": "question"}])
    inputs = Inputs([str(tmp_path)], exclude=[tmp_path / "out.jsonl"])
    assert [Path(file.path).name for file in inputs] == ["in.jsonl"]
    assert (inputs.total_files, inputs.total_bytes) == (1, (tmp_path / "in.jsonl").stat().st_size)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("missing", "no such file"),
        ("*.txt", "matches no file"),
        ("x.docx", "cannot tell its format"),
        (".", "no file to read"),
    ],
)
def test_nothing_to_read(given: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.docx").touch()
    with pytest.raises(ValueError, match=message):
        Inputs([given])


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_jsonl(tmp_path: Path, suffix: str) -> None:
    rows = [
        {"id": "a", "text": "one"},
        {"id": 7, "text": "two"},
        {"text": "three"},
        b"\n",
        {"id": True, "text": "four"},
    ]
    path = write_jsonl(tmp_path / f"rows.jsonl{suffix}", rows)
    found = records(path)
    assert by_id(found) == {"a": "one", "7": "two", f"{path}#3": "three", f"{path}#5": "four"}
    assert sum(record.weight for record in found) <= path.stat().st_size
    assert len({record.digest for record in found}) == 4


def test_columns(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"key": "k", "body": "text"}, {"body": "text"}, {"key": "m"}])
    found = by_id(records(path, text_column="body", id_column="key"))
    assert found["k"] == "text"
    assert found[f"{path}#2"] == "bad row: no string or integer in column 'key'"
    assert found["m"] == "bad row: no text in column 'body': it has 'key'"


def test_bad_rows_do_not_end_the_file(tmp_path: Path) -> None:
    deep = b"[" * 200_000 + b"\n"
    bad = [b"{broken\n", b"\xff\xfe\n", b"[1]\n", {"text": 5}, {"text": None}, {}, deep, {"text": "x" * 100}]
    path = write_jsonl(tmp_path / "rows.jsonl", [*bad, {"id": "good", "text": "fine"}])
    found = records(path, max_bytes=300_000)
    assert [record.error is None for record in found] == [False] * 7 + [True, True]
    assert all(record.error.startswith("bad row: ") for record in found if record.error)
    found = records(path, max_bytes=60)
    assert [(record.error or "").partition(":")[0] for record in found[-3:]] == ["too large", "too large", ""]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_compressed_file_that_breaks_off(tmp_path: Path, suffix: str) -> None:
    rows = [{"id": f"r{number}", "text": os.urandom(400).hex()} for number in range(500)]
    path = write_jsonl(tmp_path / f"rows.jsonl{suffix}", rows)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    after = write_jsonl(tmp_path / "z.jsonl", [{"id": "last", "text": "after"}])
    found = by_id(records(path, after))
    assert found["last"] == "after"
    assert found[str(path)].startswith("unreadable: ")
    good = [name for name in found if name.startswith("r")]
    assert 50 < len(good) < 450
    assert all(found[name] == rows[int(name[1:])]["text"] for name in good)


@pytest.mark.parametrize("content", [b"", b"not gzip", b"\x1f\x8b\x08"], ids=["empty", "other", "header"])
def test_no_compressed_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.txt.gz"
    path.write_bytes(content)
    (found,) = records(path)
    assert found.id == str(path)
    assert found.error is None if content == b"" else str(found.error).startswith("unreadable: ")


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    table = pa.table({"id": list("abc") * 50, "text": ["one", None, "three"] * 50, "other": [1, 2, 3] * 50})
    pq.write_table(table, path, row_group_size=40)
    found = records(path)
    assert [record.content for record in found[::3]] == ["one"] * 50
    assert all(record.error == "bad row: no text in column 'text': None" for record in found[1::3])
    assert found[149].where == f"{path}#150"
    assert sum(record.weight for record in found) == pytest.approx(path.stat().st_size)
    damaged = bytearray(path.read_bytes())
    damaged[-6:] = b"\xff" * 6
    path.write_bytes(damaged)
    (broken,) = records(path)
    assert str(broken.error).startswith("unreadable: ")


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "link.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "big.txt").write_text("x" * 100)
    found = by_id(records(tmp_path, max_bytes=99))
    assert found[str(tmp_path / "link.txt")] == "unreadable: No such file or directory"
    assert found[str(tmp_path / "big.txt")] == "too large: more than 99 bytes (--max-bytes)"


def test_parquet_values_that_python_cannot_hold(tmp_path: Path) -> None:
    """Each is one bad row, wherever it stands."""
    path = tmp_path / "rows.parquet"
    broken = pa.array([b"\xff\xfe", b"good", None], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"id": ["a", "b", "c"], "text": broken}), path)
    found = by_id(records(path))
    assert found["a"].startswith("bad row: 'utf-8' codec")
    assert (found["b"], found["c"]) == ("good", "bad row: no text in column 'text': None")
    far = pa.array([2**62, 0], pa.int64()).cast(pa.timestamp("us"))
    pq.write_table(pa.table({"id": far, "text": ["one", "two"]}), path)
    assert [record.content for record in records(path)] == ["one", "two"]
    pq.write_table(pa.table({"text": far}), path)
    assert [str(record.error).partition(":")[0] for record in records(path)] == ["bad row", "bad row"]


@pytest.mark.parametrize(
    ("table", "errors"),
    [
        (pa.table({"body": ["x", "y"]}), ["bad row: no text in column 'text': it has nothing"] * 2),
        (pa.table({"text": [{"a": "x"}]}), ["bad row: no text in column 'text': {'a': 'x'}"]),
        (pa.table({"text": [["x"]]}), ["bad row: no text in column 'text': ['x']"]),
        (
            pa.table([["x"], ["y"]], names=["text", "text"]),
            ["unreadable: after row 1: 'Field \"text\" exists 2 times in schema'"],
        ),
    ],
    ids=["none", "struct", "list", "two"],
)
def test_parquet_without_a_column_of_text(tmp_path: Path, table: pa.Table, errors: list[str]) -> None:
    """Files of the same folder are read all the same."""
    pq.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "b.txt").write_text("fine")
    *bad, good = records(tmp_path)
    assert [record.error for record in bad] == errors
    assert good.content == b"fine"


PARQUET_OF_LONG_VALUES = """
import resource, sys
import pyarrow as pa, pyarrow.parquet as pq
from pathlib import Path
from vllm_longmamba.summarize.inputs import Inputs
from vllm_longmamba.summarize.settings import JobSettings
from vllm_longmamba.summarize.sources import read_records
path = sys.argv[1]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
settings = JobSettings(inputs=(path,), output=Path("o.jsonl"), model="m", max_bytes=int(sys.argv[2]))
records = read_records(Inputs([path]), settings)
found = [record.error or len(record.content) for record in records]
print(set(found), len(found), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.parametrize("max_bytes", [1_000_000, 100_000_000])
def test_a_small_parquet_of_long_values(tmp_path: Path, max_bytes: int) -> None:
    """64 rows that share one text of 20 MB: it is in memory a few times, not 64 times."""
    path = tmp_path / "rows.parquet"
    pq.write_table(
        pa.table({"text": pa.DictionaryArray.from_arrays([0] * 64, ["x" * 20_000_000])}), path, compression="zstd"
    )
    assert path.stat().st_size < 20_000
    ran = subprocess.run(
        [sys.executable, "-c", PARQUET_OF_LONG_VALUES, path, str(max_bytes)], capture_output=True, text=True, check=True
    )
    found, megabytes = ran.stdout.strip().rsplit(" ", 1)
    expected = "'too large: more than 1000000 bytes (--max-bytes)'" if max_bytes == 1_000_000 else "20000000"
    # All contents are kept here only as their lengths.
    assert found == f"{{{expected}}} 64"
    assert int(megabytes) < 300


def test_what_is_no_file(tmp_path: Path) -> None:
    """A pipe without its other end, an endless device, a link to itself: none of them stops the reading."""
    os.mkfifo(tmp_path / "pipe.txt")
    os.mkfifo(tmp_path / "pipe.parquet")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    (tmp_path / "loop.txt").symlink_to(tmp_path / "loop.txt")
    (tmp_path / "fine.txt").write_text("fine")
    found = {Path(name).name: said for name, said in by_id(records(tmp_path)).items()}
    assert found.pop("fine.txt") == b"fine"
    assert found.pop("loop.txt") == "unreadable: Too many levels of symbolic links"
    assert found.pop("pipe.parquet").endswith("not a regular file but a folder, a pipe, a socket or a device")
    no_file = "unreadable: not a regular file but a folder, a pipe, a socket or a device"
    assert found == {"pipe.txt": no_file, "zero.jsonl": no_file}


def test_a_folder_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error row stands for what it may hold: the job is not complete without an error."""
    for name in ("a", "locked.d", "z"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_text(name)
    scandir = os.scandir

    def refusing(path: str) -> Any:
        if Path(path).name == "locked.d":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    found = by_id(records(tmp_path))
    assert str(found.pop(str(tmp_path / "locked.d"))).startswith("unreadable: ")
    assert found == {str(tmp_path / name / "x.txt"): name.encode() for name in ("a", "z")}


def test_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = JobSettings(inputs=("-",), output=Path("out.jsonl"), model="m")
    for file_format, expected in (("jsonl", ["a", "-#2"]), ("text", ["-"])):
        reading, writing = os.pipe()
        os.write(writing, b'{"id": "a", "text": "one"}\n{"text": "two"}\n')
        os.close(writing)
        files = [InputFile("-", file_format, None, 0)]
        with open(reading) as stdin:
            monkeypatch.setattr("sys.stdin", stdin)
            assert [record.id for record in read_records(files, settings)] == expected
