"""The output as it grows: a JSONL file that each answer is appended to at once, and that survives a kill."""

import errno
import fcntl
import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from vllm_longmamba.summarize.index import Index
from vllm_longmamba.summarize.records import Row

_SYNC_INTERVAL_S = 1.0
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DiskFullError(Exception):
    """No room for another row. The file ends with a whole one."""


class Journal:
    """An append-only JSONL file, locked against other jobs.

    Each row is one write, so that a kill leaves at most one torn line, which the next `Journal` cuts off. Rows reach
    the disk itself at least once a second while rows are written, and on closing.

    Args:
        path: the file; made if it is missing.
        discard: begin with an empty file, whatever it is.

    Attributes:
        path: the file.
        size: its bytes.

    Raises:
        ValueError: another job writes it, or a line in the middle is none of ours.
    """

    def __init__(self, path: Path, *, discard: bool = False) -> None:
        self.path = path
        self._descriptor = _open_locked(path)
        try:
            if discard:
                os.ftruncate(self._descriptor, 0)
            self.size, self._has_repeated, self._has_errors = _repair(self._descriptor, path)
        except BaseException:
            os.close(self._descriptor)
            raise
        self._synced = time.monotonic()

    def load(self, index: Index, *, drop_errors: bool = False) -> int:
        """Enter the rows into an index, after dropping those that a later one replaces.

        Args:
            index: gets id and hash of every row kept.
            drop_errors: drop error rows too, so that their records are tried again.

        Returns:
            Number of rows kept.
        """
        if self._has_repeated or (drop_errors and self._has_errors):
            self._compact(drop_errors=drop_errors)
        rows = 0
        for row in read_rows(self.path):
            index.add(row["id"], row["hash"])
            rows += 1
        return rows

    def append(self, row: Row, *, replaces: bool = False) -> None:
        """Write a row.

        Args:
            row: the row.
            replaces: whether an earlier row has its id; that one is dropped on closing.

        Raises:
            DiskFullError: the disk or quota is full; nothing of the row is left in the file.
        """
        line = _line(row.to_dict())
        try:
            written = os.write(self._descriptor, line)
            if written < len(line):
                # The rest would fail: a short write to a file means that the disk is full.
                written += os.write(self._descriptor, line[written:])
        except OSError as error:
            os.ftruncate(self._descriptor, self.size)
            raise disk_full(error, self.path) or error from None
        self.size += written
        self._has_repeated |= replaces
        if time.monotonic() - self._synced > _SYNC_INTERVAL_S:
            self.sync()

    def sync(self) -> None:
        """Let the rows reach the disk.

        Raises:
            DiskFullError: it has no room for them after all.
        """
        try:
            os.fdatasync(self._descriptor)
        except OSError as error:
            raise disk_full(error, self.path) or error from None
        self._synced = time.monotonic()

    def compact(self) -> None:
        """Drop rows that a later one replaces, if there are any."""
        if self._has_repeated:
            self._compact(drop_errors=False)

    def close(self) -> None:
        """Let the rows reach the disk, and unlock the file. Calling it again does nothing."""
        if self._descriptor < 0:
            return
        try:
            self.sync()
        finally:
            os.close(self._descriptor)
            self._descriptor = -1

    def replace(self, rows: Iterable[dict[str, Any]]) -> None:
        """Let other rows take the place of all rows, at one moment.

        Args:
            rows: as `Row.to_dict` gives them.

        Raises:
            DiskFullError: no room; the rows are those of before.
        """
        temporary = self.path.with_name(self.path.name + ".tmp")
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
        has_errors = False
        try:
            # Locked before it takes the place of the other: no job can come in between.
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with open(descriptor, "wb", closefd=False) as target:
                for row in rows:
                    has_errors |= row["error"] is not None
                    target.write(_line(row))
            os.fdatasync(descriptor)
            size = os.fstat(descriptor).st_size
            os.replace(temporary, self.path)
        except BaseException as error:
            os.close(descriptor)
            temporary.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise disk_full(error, self.path) or error from None
            raise
        os.close(self._descriptor)
        self._descriptor, self.size = descriptor, size
        self._has_repeated, self._has_errors = False, has_errors

    def _compact(self, *, drop_errors: bool) -> None:
        to_come = _repetitions(self.path)

        def stays(row: dict[str, Any]) -> bool:
            if to_come.get(row["id"], 0):
                to_come[row["id"]] -= 1
                return False
            return not (drop_errors and row["error"] is not None)

        self.replace(filter(stays, read_rows(self.path)))


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def disk_full(error: OSError, path: Path) -> DiskFullError | None:
    """The error as `DiskFullError` if that is what it means."""
    if error.errno not in _DISK_FULL:
        return None
    return DiskFullError(f"cannot write {path}: {os.strerror(error.errno)}")


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a journal, in order, up to a torn last line."""
    with path.open("rb") as lines:
        for line in lines:
            if line.endswith(b"\n"):
                yield json.loads(line)


def _repetitions(path: Path) -> dict[str, int]:
    """How many more rows come after the first one of an id; ids with a single row are left out."""
    index = Index()
    repetitions: Counter[str] = Counter(row["id"] for row in read_rows(path) if index.add(row["id"], ""))
    index.close()
    return repetitions


def _open_locked(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A job that ended just now may have put another file in its place.
            if os.fstat(descriptor).st_ino == path.stat().st_ino:
                return descriptor
        except FileNotFoundError:
            pass
        except OSError:
            os.close(descriptor)
            raise ValueError(f"{path} is being written by another job; wait for it, or choose another output") from None
        os.close(descriptor)


def _repair(descriptor: int, path: Path) -> tuple[int, bool, bool]:
    """Cut off a torn last line, and check the others.

    Returns:
        Size in bytes, whether an id has several rows, whether there are error rows.
    """
    size, repeated, errors = 0, False, False
    index = Index()
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                os.ftruncate(descriptor, size)
                break
            row = _checked_row(line, f"{path}, line {number}")
            repeated |= index.add(row["id"], "")
            errors |= row["error"] is not None
            size += len(line)
    index.close()
    return size, repeated, errors


def _checked_row(line: bytes, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
        if isinstance(row, dict) and isinstance(row["id"], str) and isinstance(row["hash"], str) and "error" in row:
            return row
    except (ValueError, KeyError):
        pass
    raise ValueError(
        f"{place}: not a row of `longmamba summarize`; choose another output, or begin anew with --overwrite"
    )
