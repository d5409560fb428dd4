"""The store survives an interruption, tells settings apart, and leaves the files of others as they are."""

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_longmamba.evaluate.store import FILE_NAME, Store, settings_key

IDENTITY = {"method": "plain", "settings": "x", "task": "passkey", "length": 512, "depth": 0.5, "seed": 0}


def test_results_are_there_after_reopening(tmp_path: Path) -> None:
    with Store(tmp_path / "new") as store:
        assert IDENTITY not in store
        store.add(IDENTITY, {"found": [True]})
        store.add({**IDENTITY, "depth": None}, {"found": [False, True]})
        # Not closed: what is added is on disk at once.
        with Store(tmp_path / "new") as again:
            assert again.result(IDENTITY) == {"found": [True]}
            assert again.result(dict(reversed({**IDENTITY, "depth": None}.items()))) == {"found": [False, True]}
            assert {**IDENTITY, "settings": "y"} not in again
            assert {**IDENTITY, "length": 513} not in again
        with pytest.raises(KeyError, match="513"):
            store.result({**IDENTITY, "length": 513})


def test_what_a_killed_process_added_is_kept(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from vllm_longmamba.evaluate.store import Store; "
        "store = Store(Path(sys.argv[1])); [store.add({'seed': n}, {'n': n}) for n in range(50)]; "
        "store.write({'report.md': b'half'}); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == -9
    with Store(tmp_path) as store:
        assert [store.result({"seed": n}) for n in range(50)] == [{"n": n} for n in range(50)]
        store.write({"report.md": b"whole"})


@pytest.mark.parametrize("content", [b'{"precious":1}', b"x" * 5000, b"SQLite format 3\0 but no more"])
def test_a_foreign_file_in_the_place_of_the_store_is_left_alone(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE_NAME).write_bytes(content)
    with pytest.raises(ValueError, match=r"results\.sqlite: not written by longmamba; move the file"):
        Store(tmp_path)
    assert (tmp_path / FILE_NAME).read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


def test_a_foreign_database_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE results (identity TEXT, precious TEXT)")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="not written by longmamba"):
        Store(tmp_path)
    assert path.read_bytes() == before


def test_an_empty_file_is_taken(tmp_path: Path) -> None:
    """As a process leaves it that was killed before it wrote anything."""
    (tmp_path / FILE_NAME).touch()
    for seen in (False, True):
        with Store(tmp_path) as store:
            assert ({"n": 1} in store) is seen
            store.add({"n": 1}, {"of": 1})


@pytest.mark.parametrize("left", [100, 4096, 20_000])
def test_a_damaged_file_is_said(tmp_path: Path, left: int) -> None:
    """Its path and what to do, whenever it is noticed."""
    with Store(tmp_path) as store:
        for number in range(1000):
            store.add({"n": number}, {"of": "x" * 50})
    path = tmp_path / FILE_NAME
    path.write_bytes(path.read_bytes()[:left])
    with (
        pytest.raises(ValueError, match=r"results\.sqlite: .*; check the disk, or move the file"),
        Store(tmp_path) as store,
    ):
        store.result({"n": 999})


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    def fill() -> None:
        with Store(tmp_path) as store:
            store._database.execute("PRAGMA max_page_count = 10")
            for number in range(1000):
                store.add({"n": number}, {"of": "x" * 50})

    with pytest.raises(ValueError, match=r"results\.sqlite: .* is full; make room, and"):
        fill()


def test_only_own_files_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "report.md").write_bytes(b"precious")
    with Store(tmp_path) as store:
        files = {"report.json": b"new", "report.md": b"new"}
        for act in (store.check_files, store.write):
            with pytest.raises(ValueError, match=r"report\.md: was not written by this evaluation"):
                act(files)
        assert (tmp_path / "report.md").read_bytes() == b"precious"
        assert not (tmp_path / "report.json").exists()
        store.write({"report.json": b"first"})
        store.write({"report.json": b"second"})
        assert (tmp_path / "report.json").read_bytes() == b"second"
    with Store(tmp_path) as store:
        store.check_files(["report.json"])
        (tmp_path / "report.json").write_bytes(b"my own notes")
        with pytest.raises(ValueError, match="or was changed since"):
            store.write({"report.json": b"third"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.md", FILE_NAME]


def test_settings_key() -> None:
    assert settings_key({"a": 1, "b": [2]}) == settings_key({"b": [2], "a": 1})
    assert settings_key({"a": 1}) != settings_key({"a": 2})
