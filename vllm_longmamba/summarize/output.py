"""The output of a job: its journal, the settings it was made with, and the parquet file at the end."""

import json
import os
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from vllm_longmamba.summarize.index import Index
from vllm_longmamba.summarize.journal import Journal, disk_full, read_rows
from vllm_longmamba.summarize.records import COLUMNS

_JSONL = (".jsonl", ".ndjson")
_PARQUET = ".parquet"
_ROWS_AT_ONCE = 256
_FORMAT = 1


class Output:
    """The files of an output, by its name.

    A JSONL output is its own journal. A parquet output is written when the job is complete, from `NAME.partial.jsonl`.

    Args:
        path: .jsonl, .ndjson or .parquet.

    Raises:
        ValueError: another suffix.
    """

    def __init__(self, path: Path) -> None:
        if path.suffix not in (*_JSONL, _PARQUET):
            raise ValueError(f"--output {path}: must end with {', '.join(_JSONL)} or {_PARQUET}")
        self.path = path
        self.is_parquet = path.suffix == _PARQUET
        self.journal_path = path.with_name(path.name + ".partial.jsonl") if self.is_parquet else path
        self.settings_path = path.with_name(path.name + ".job.json")

    def files(self) -> list[Path]:
        """Every file that a job may leave, temporary ones included."""
        names = [self.path, self.journal_path, self.settings_path]
        return names + [_temporary(path) for path in names]

    def open(self, settings: dict[str, Any], index: Index, *, overwrite: bool, retry_errors: bool) -> Journal:
        """Lock the output, check that it was made with these settings, and enter its rows into an index.

        Args:
            settings: everything that changes answers.
            index: gets the rows.
            overwrite: begin anew, whatever there is.
            retry_errors: drop error rows.

        Returns:
            The journal, which the caller closes.

        Raises:
            ValueError: another job writes it, or it was made with other settings.
            DiskFullError: no room.
        """
        try:
            journal = Journal(self.journal_path, discard=overwrite)
        except OSError as error:
            raise disk_full(error, self.journal_path) or error from None
        try:
            if self.is_parquet and journal.size == 0 and self.path.exists() and not overwrite:
                journal.replace(_parquet_rows(self.path))
            rows = journal.load(index, drop_errors=retry_errors)
            if rows:
                self._check_settings(settings)
            _write(self.settings_path, json.dumps({"format": _FORMAT, "settings": settings}, indent=1))
        except BaseException:
            journal.close()
            raise
        return journal

    def peek(self, index: Index) -> None:
        """Enter the rows into an index without changing a file.

        Raises:
            ValueError: the output is none of ours.
        """
        rows: Iterator[dict[str, Any]] = iter(())
        if self.journal_path.exists():
            rows = read_rows(self.journal_path)
        elif self.is_parquet and self.path.exists():
            rows = _parquet_rows(self.path)
        for row in rows:
            index.add(row["id"], row["hash"])

    def finish(self, journal: Journal, *, complete: bool) -> int:
        """Drop replaced rows; write the parquet file if the job is complete.

        Args:
            journal: of this output; is closed.
            complete: whether every record has a row.

        Returns:
            Number of error rows.

        Raises:
            DiskFullError: no room; the journal is whole, and the next run tries again.
        """
        try:
            journal.compact()
            errors = sum(row["error"] is not None for row in read_rows(self.journal_path))
            if complete and self.is_parquet:
                _write_parquet(self.path, self.journal_path)
                self.journal_path.unlink()
            return errors
        finally:
            journal.close()

    def _check_settings(self, settings: dict[str, Any]) -> None:
        advice = "resume with the settings it was begun with, choose another output, or begin anew with --overwrite"
        try:
            before = json.loads(self.settings_path.read_text(encoding="utf-8"))["settings"]
        except (OSError, ValueError, KeyError):
            raise ValueError(
                f"{self.path} has rows, but {self.settings_path.name} is not there or damaged; {advice}"
            ) from None
        changed = [
            f"{name} was {before.get(name)!r}, is {settings.get(name)!r}"
            for name in sorted(before.keys() | settings.keys())
            if before.get(name) != settings.get(name)
        ]
        if changed:
            raise ValueError(f"{self.path} was begun with other settings ({'; '.join(changed)}); {advice}")


def _write(path: Path, text: str) -> None:
    temporary = _temporary(path)
    _replace(path, lambda: temporary.write_text(text + "\n", encoding="utf-8"))


def _replace(path: Path, write: Callable[[], object]) -> None:
    """Call a function that writes the temporary file of a path, and let that file take its place."""
    temporary = _temporary(path)
    try:
        write()
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise disk_full(error, path) or error from None


def _temporary(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


def _write_parquet(path: Path, journal_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = _schema()

    def write() -> None:
        rows = read_rows(journal_path)
        with pq.ParquetWriter(_temporary(path), schema, compression="zstd") as writer:
            while some := list(islice(rows, _ROWS_AT_ONCE)):
                writer.write_batch(pa.RecordBatch.from_pylist(some, schema=schema))

    _replace(path, write)


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as table:
            if missing := set(COLUMNS) - set(table.schema_arrow.names):
                raise ValueError(f"it lacks the columns {', '.join(sorted(missing))}")
            for batch in table.iter_batches(_ROWS_AT_ONCE, columns=list(COLUMNS)):
                yield from batch.to_pylist()
    except (pa.ArrowException, ValueError) as error:
        raise ValueError(
            f"{path} is no output of `longmamba summarize` ({error}); choose another, or begin anew with --overwrite"
        ) from None


def _schema() -> Any:
    import pyarrow as pa

    step = pa.struct(
        [
            ("level", pa.int32()),
            ("section", pa.int32()),
            ("prompt_tokens", pa.int64()),
            ("output_tokens", pa.int64()),
            ("summary", pa.string()),
        ]
    )
    types = {
        "prompt_tokens": pa.int64(),
        "output_tokens": pa.int64(),
        "seconds": pa.float64(),
        "dropped_tokens": pa.int64(),
        "steps": pa.list_(step),
    }
    return pa.schema([(name, types.get(name, pa.string())) for name in COLUMNS])
