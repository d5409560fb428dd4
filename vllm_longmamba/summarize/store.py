"""What a job has done: one SQLite file beside the output, which the output is exported from."""

import errno
import fcntl
import json
import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Any

from blake3 import blake3

from vllm_longmamba.summarize.export import WRITERS
from vllm_longmamba.summarize.records import DiskFullError, Row

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# SQLite's mark of who made a file: "lmsm".
_APPLICATION = 0x6C6D736D
_SCHEMA = f"""
    BEGIN;
    CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
    CREATE TABLE rows (
        number INTEGER PRIMARY KEY, id TEXT UNIQUE NOT NULL, hash TEXT NOT NULL, failed INTEGER NOT NULL,
        row TEXT NOT NULL
    );
    PRAGMA application_id = {_APPLICATION};
    COMMIT;
"""
# Ids that this run has met, in a file that SQLite deletes.
_MET = """
    PRAGMA temp.journal_mode = OFF;
    PRAGMA temp.cache_size = -4096;
    CREATE TEMP TABLE met (key BLOB PRIMARY KEY, hash TEXT) WITHOUT ROWID;
"""


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
        overwrite: forget all rows, but not before `begin`.
        retry_errors: the same of error rows.

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
        if output.suffix not in WRITERS:
            raise ValueError(f"--output {output}: must end with {', '.join(WRITERS)}")
        self.output = output
        self.path = output.with_name(output.name + ".db")
        self._admitting, self._exporting = threading.Lock(), threading.Lock()
        self._settings = settings
        # Which rows are as if they were not there.
        self._forgotten = "1" if overwrite else "failed" if retry_errors else "0"
        with ExitStack() as stack, _disk(self.path):
            if settings is not None:
                self._lock(stack)
                self._rows = self._connect(stack, "rw")
            elif self.path.exists() and self.path.stat().st_size and not overwrite:
                # Where no job is at work or was killed, SQLite needs no files of its own beside it, and leaves none.
                is_quiet = not self.path.with_name(self.path.name + "-wal").exists()
                self._rows = self._connect(stack, "ro&immutable=1" if is_quiet else "ro")
            else:
                self._rows = stack.enter_context(closing(sqlite3.connect("", isolation_level=None)))
            if not self._is_begun():
                self._rows.executescript(_SCHEMA)
            if settings is not None:
                self._check(settings, overwrite)
            self._rows.executescript(_MET)
            self._resources = stack.pop_all()

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
        with self._admitting, _disk(self.path):
            met = self._rows.execute("SELECT hash FROM met WHERE key = ?", (key,)).fetchone()
            if met is not None:
                return Verdict.REPEATED if met == (content_hash,) else Verdict.CLASHING
            self._rows.execute("INSERT INTO met VALUES (?, ?)", (key, content_hash))
            kept = f"SELECT hash FROM rows WHERE id = ? AND NOT {self._forgotten}"
            row = self._rows.execute(kept, (record_id,)).fetchone()
        return Verdict.DONE if row == (content_hash,) else Verdict.NEW

    def begin(self) -> None:
        """Forget the rows that are to be answered anew: not before there is something in their place."""
        if self._settings is None:
            return
        with _disk(self.path):
            self._rows.execute(f"DELETE FROM rows WHERE {self._forgotten}")
            _set(self._rows, "settings", self._settings)
        self._settings, self._forgotten = None, "0"

    def put(self, row: Row) -> None:
        """Write a row; one of the same id makes room for it. The first one begins the output.

        Raises:
            DiskFullError: no room; nothing was written.
        """
        text = json.dumps(asdict(row), ensure_ascii=False, allow_nan=False).encode("utf-8", "replace").decode()
        values = row.id, row.hash, row.error is not None, text
        self.begin()
        with _disk(self.path):
            self._rows.execute("INSERT OR REPLACE INTO rows (id, hash, failed, row) VALUES (?, ?, ?, ?)", values)

    def sync(self) -> None:
        """Let the rows reach the disk itself."""
        with suppress(FileNotFoundError), self.path.with_name(self.path.name + "-wal").open("rb") as log:
            os.fsync(log.fileno())

    def count(self, *, failed: bool) -> int:
        """Number of rows, or of error rows."""
        return int(self._rows.execute(f"SELECT count(*) FROM rows {'WHERE failed' if failed else ''}").fetchone()[0])

    def export(self) -> None:
        """Let a new output with all rows take the place of the old one.

        Raises:
            ValueError: what is there is not what this store wrote last.
            DiskFullError: no room; the old output stays.
        """
        temporary = self.output.with_name(f".{self.output.name}.longmamba.tmp")
        # Another thread may write rows meanwhile.
        with self._exporting, _disk(self.output), ExitStack() as stack:
            connection = self._connect(stack, "rw")
            self._check_output(connection)
            # Of a job that was killed.
            temporary.unlink(missing_ok=True)
            try:
                rows = (row for (row,) in connection.execute("SELECT row FROM rows ORDER BY number"))
                WRITERS[self.output.suffix](temporary, rows)
                # Both are ours, whichever a kill leaves there.
                _set(connection, "written", [_digest(path) for path in (self.output, temporary) if path.exists()])
                os.replace(temporary, self.output)
            finally:
                temporary.unlink(missing_ok=True)

    def close(self) -> None:
        """Give everything free."""
        # A thread that reads records may have been abandoned.
        with self._admitting:
            self._resources.close()

    def _lock(self, stack: ExitStack) -> None:
        """Take the store, which is made if there is none, for this job alone."""
        if os.path.lexists(self.output) and not self.path.exists():
            raise ValueError(
                f"{self.output} was not written by a job of `longmamba summarize` ({self.path.name} is not beside it); "
                "choose another output, or move it away"
            )
        self.output.parent.mkdir(parents=True, exist_ok=True)
        lock = stack.enter_context(self.path.open("ab"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(
                f"{self.output} is being written by another job; wait for it, or choose another output"
            ) from None

    def _check(self, settings: dict[str, Any], overwrite: bool) -> None:
        """Refuse an output that this job cannot go on with."""
        self._check_output(self._rows)
        self._rows.executescript("PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL")
        before = _get(self._rows, "settings", {})
        changed = [name for name in settings.keys() | before.keys() if settings.get(name) != before.get(name)]
        if changed and self.count(failed=False) and not overwrite:
            told = [f"{name} was {before.get(name)!r}, is {settings.get(name)!r}" for name in sorted(changed)]
            raise ValueError(
                f"{self.output} was begun with other settings ({'; '.join(told)}); resume with the settings it "
                "was begun with, choose another output, or begin anew with --overwrite"
            )

    def _connect(self, stack: ExitStack, mode: str) -> sqlite3.Connection:
        address = f"{self.path.absolute().as_uri()}?mode={mode}"
        connection = sqlite3.connect(address, uri=True, check_same_thread=False, isolation_level=None)
        return stack.enter_context(closing(connection))

    def _is_begun(self) -> bool:
        """Whether a job has been here before."""
        try:
            (application,) = self._rows.execute("PRAGMA application_id").fetchone()
            (tables,) = self._rows.execute("SELECT count(*) FROM sqlite_master").fetchone()
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError:
            application, tables = 0, 1
        if application != _APPLICATION and tables:
            raise ValueError(
                f"{self.path} is no store of `longmamba summarize`; move it away, or choose another output"
            )
        return bool(tables)

    def _check_output(self, connection: sqlite3.Connection) -> None:
        """Refuse to replace what this store has not written."""
        if not os.path.lexists(self.output):
            return
        if not self.output.is_file() or _digest(self.output) not in _get(connection, "written", []):
            raise ValueError(
                f"{self.output} is not as this job has written it, and stays as it is; move it away, and the same "
                f"command writes it anew from {self.path.name}"
            )


def _get(connection: sqlite3.Connection, name: str, default: Any) -> Any:
    found = connection.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
    return default if found is None else json.loads(found[0])


def _set(connection: sqlite3.Connection, name: str, value: Any) -> None:
    connection.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, json.dumps(value)))


def _digest(path: Path) -> str:
    return blake3().update_mmap(path).hexdigest()


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    """Turn what means that there is no room into a `DiskFullError`."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if error.sqlite_errorname.startswith(("SQLITE_FULL", "SQLITE_IOERR")):
            raise DiskFullError(f"cannot write {path}: {error}") from None
        raise ValueError(f"{path}: {error}") from None
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise DiskFullError(f"cannot write {path}: {error.strerror}") from None
        raise
