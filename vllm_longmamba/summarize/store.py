"""What a job has done: one SQLite file beside the output, which the output is exported from."""

import errno
import fcntl
import json
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path
from typing import Any

from blake3 import blake3

from vllm_longmamba.summarize.export import write_jsonl, write_parquet
from vllm_longmamba.summarize.records import DiskFullError, Row

_WRITERS: dict[str, Callable[[Path, Iterator[str]], None]] = {
    ".jsonl": write_jsonl,
    ".ndjson": write_jsonl,
    ".parquet": write_parquet,
}
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# SQLite's mark of who made a file: "lmsm".
_APPLICATION = 0x6C6D736D
_SCHEMA = f"""
    BEGIN;
    CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
    CREATE TABLE rows (number INTEGER PRIMARY KEY, id TEXT UNIQUE NOT NULL, hash TEXT NOT NULL, failed INTEGER NOT NULL, row TEXT NOT NULL);
    PRAGMA application_id = {_APPLICATION};
    COMMIT;
"""  # noqa: E501


class Verdict(Enum):
    """What to do with a record."""

    NEW = "new"
    DONE = "done"
    REPEATED = "repeated"
    CLASHING = "clashing"


class Store:
    """The rows of an output: `OUT.db`, locked against other jobs while it is open for writing.

    Each row is one transaction, so that a kill at any moment leaves whole rows only.

    Args:
        output: .jsonl, .ndjson or .parquet.
        settings: everything that changes answers; None opens for reading only, and changes no file.
        overwrite: forget all rows.
        retry_errors: forget error rows.

    Raises:
        ValueError: another job writes it, it was made with other settings, or the output is not of this store.
        DiskFullError: no room.
    """

    def __init__(
        self,
        output: Path,
        settings: dict[str, Any] | None = None,
        *,
        overwrite: bool = False,
        retry_errors: bool = False,
    ) -> None:
        if output.suffix not in _WRITERS:
            raise ValueError(f"--output {output}: must end with {', '.join(_WRITERS)}")
        self.output = output
        self.path = output.with_name(output.name + ".db")
        self._lock: int | None = None
        self._known: tuple[int, ...] | None = None
        self._exporting = threading.Lock()
        # Ids that this run has met, in a file that SQLite deletes. One transaction for ever: nobody else reads it.
        self._met = sqlite3.connect("", check_same_thread=False, isolation_level=None)
        self._met.executescript("PRAGMA journal_mode = OFF; PRAGMA cache_size = -4096")
        self._met.executescript("CREATE TABLE met (key BLOB PRIMARY KEY, hash TEXT) WITHOUT ROWID; BEGIN")
        self._rows: sqlite3.Connection | None = None
        self._reading: sqlite3.Connection | None = None
        try:
            with _disk(self.path):
                if settings is not None:
                    self._open(settings, overwrite, retry_errors)
                elif self.path.exists() and not overwrite:
                    self._reading = self._connect("ro")
                    self._check_ours(self._reading)
        except BaseException:
            self.close()
            raise

    def files(self) -> list[Path]:
        """Every file that is never an input; temporary ones are hidden."""
        return [self.output, *(self.path.with_name(self.path.name + more) for more in ("", "-wal", "-shm"))]

    def admit(self, record_id: str, content_hash: str) -> Verdict:
        """Decide on a record of the input, and note that this run has met its id; by one thread only.

        Returns:
            NEW: no row is for this content. DONE: answered already. REPEATED: this run has met the id with the same
            content. CLASHING: this run has met the id with another content.
        """
        key = blake3(record_id.encode()).digest(16)
        with _disk(self.path):
            met = self._met.execute("SELECT hash FROM met WHERE key = ?", (key,)).fetchone()
            if met is not None:
                return Verdict.REPEATED if met[0] == content_hash else Verdict.CLASHING
            self._met.execute("INSERT INTO met VALUES (?, ?)", (key, content_hash))
            if self._reading is None:
                return Verdict.NEW
            row = self._reading.execute("SELECT hash FROM rows WHERE id = ?", (record_id,)).fetchone()
        return Verdict.DONE if row is not None and row[0] == content_hash else Verdict.NEW

    def put(self, row: Row) -> None:
        """Write a row; one of the same id makes room for it.

        Raises:
            DiskFullError: no room; nothing was written.
        """
        assert self._rows is not None
        text = json.dumps(row.to_dict(), ensure_ascii=False, allow_nan=False).encode("utf-8", "replace").decode()
        with _disk(self.path):
            self._rows.execute(
                "INSERT OR REPLACE INTO rows (id, hash, failed, row) VALUES (?, ?, ?, ?)",
                (row.id, row.hash, row.error is not None, text),
            )

    def sync(self) -> None:
        """Let the rows reach the disk itself."""
        with suppress(FileNotFoundError):
            descriptor = os.open(self.path.with_name(self.path.name + "-wal"), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def count(self, *, failed: bool) -> int:
        """Number of rows, or of error rows."""
        assert self._rows is not None
        condition = "WHERE failed" if failed else ""
        return int(self._rows.execute(f"SELECT count(*) FROM rows {condition}").fetchone()[0])

    def export(self) -> None:
        """Let a new output with all rows take the place of the old one.

        Raises:
            ValueError: what is there is not what this store wrote last.
            DiskFullError: no room; the old output stays.
        """
        temporary = self.output.with_name(f".{self.output.name}.longmamba.tmp")
        with self._exporting, _disk(self.output):
            # Another thread may write rows meanwhile.
            connection = self._connect("rw")
            try:
                self._check_output(connection)
                # Of a job that was killed.
                temporary.unlink(missing_ok=True)
                rows = (row for (row,) in connection.execute("SELECT row FROM rows ORDER BY number"))
                _WRITERS[self.output.suffix](temporary, rows)
                # Both are ours, whichever a kill leaves there.
                written = [_digest(path) for path in (self.output, temporary) if path.exists()]
                _set(connection, "written", written)
                os.replace(temporary, self.output)
                self._known = _identity(self.output)
            finally:
                connection.close()
                temporary.unlink(missing_ok=True)

    def close(self) -> None:
        """Give everything free."""
        for connection in (self._met, self._reading, self._rows):
            if connection is not None:
                connection.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _open(self, settings: dict[str, Any], overwrite: bool, retry_errors: bool) -> None:
        if not self.path.exists():
            self._refuse_foreign()
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(
                f"{self.output} is being written by another job; wait for it, or choose another output"
            ) from None
        self._rows = self._connect("rw")
        if not self._check_ours(self._rows):
            self._refuse_foreign()
            self._rows.executescript(_SCHEMA)
        self._check_output(self._rows)
        self._rows.executescript("PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL")
        if not overwrite and self.count(failed=False):
            self._check_settings(_get(self._rows, "settings", {}), settings)
        if overwrite or retry_errors:
            self._rows.execute(f"DELETE FROM rows {'' if overwrite else 'WHERE failed'}")
        _set(self._rows, "settings", settings)
        self._reading = self._connect("ro")

    def _connect(self, mode: str) -> sqlite3.Connection:
        return sqlite3.connect(
            f"{self.path.absolute().as_uri()}?mode={mode}", uri=True, check_same_thread=False, isolation_level=None
        )

    def _check_ours(self, connection: sqlite3.Connection) -> bool:
        """Whether a job has been here; False of an empty file."""
        try:
            (application,) = connection.execute("PRAGMA application_id").fetchone()
            (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise
            application, tables = 0, 1
        if application != _APPLICATION and tables:
            raise ValueError(
                f"{self.path} is no store of `longmamba summarize`; move it away, or choose another output"
            )
        return bool(tables)

    def _refuse_foreign(self) -> None:
        """Refuse an output without a store."""
        old = self.output.with_name(self.output.name + ".job.json")
        if old.exists():
            raise ValueError(
                f"{self.output} was begun by an earlier version, whose rows this one cannot go on from ({old.name} is "
                f"beside it); choose another output, or move {self.output.name}, {old.name} and "
                f"{self.output.name}.partial.jsonl away to begin anew"
            )
        if os.path.lexists(self.output):
            raise ValueError(
                f"{self.output} was not written by a job of `longmamba summarize` ({self.path.name} is not beside it); "
                "choose another output, or move it away"
            )

    def _check_output(self, connection: sqlite3.Connection) -> None:
        """Refuse to replace what this store has not written."""
        if not os.path.lexists(self.output) or _identity(self.output) == self._known:
            return
        if not self.output.is_file() or _digest(self.output) not in _get(connection, "written", []):
            raise ValueError(
                f"{self.output} is not as this job has written it, and stays as it is; move it away, and the same "
                f"command writes it anew from {self.path.name}"
            )
        self._known = _identity(self.output)

    def _check_settings(self, before: dict[str, Any], settings: dict[str, Any]) -> None:
        changed = [
            f"{name} was {before.get(name)!r}, is {settings.get(name)!r}"
            for name in sorted(before.keys() | settings.keys())
            if before.get(name) != settings.get(name)
        ]
        if changed:
            raise ValueError(
                f"{self.output} was begun with other settings ({'; '.join(changed)}); resume with the settings it was "
                "begun with, choose another output, or begin anew with --overwrite"
            )


def _get(connection: sqlite3.Connection, name: str, default: Any) -> Any:
    found = connection.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
    return default if found is None else json.loads(found[0])


def _set(connection: sqlite3.Connection, name: str, value: Any) -> None:
    connection.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, json.dumps(value)))


def _identity(path: Path) -> tuple[int, ...]:
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _digest(path: Path) -> str:
    return blake3().update_mmap(path).hexdigest()


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    """Turn what means that there is no room into a `DiskFullError`."""
    try:
        yield
    except sqlite3.OperationalError as error:
        name = getattr(error, "sqlite_errorname", "")
        if name.startswith(("SQLITE_FULL", "SQLITE_IOERR")):
            raise DiskFullError(f"cannot write {path}: {error}") from None
        raise ValueError(f"{path}: {error}") from None
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise DiskFullError(f"cannot write {path}: {error.strerror}") from None
        raise
