"""Reads the input files record by record; what cannot be read is a record with an error."""

import io
import json
import os
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import IO, Any

from blake3 import blake3

from vllm_longmamba.summarize.inputs import STDIN, InputFile
from vllm_longmamba.summarize.records import Record, RecordError
from vllm_longmamba.summarize.settings import JobSettings

_BATCH_ROWS = 64
_BATCH_BYTES = 16 * 2**20


def read_records(files: Iterable[InputFile], settings: JobSettings) -> Iterator[Record]:
    """All records of all files, in order, one at a time in memory.

    Yields:
        Records; those with an error have no content. A file that breaks off gives its rows so far, and one error.
    """
    readers = {"jsonl": _read_jsonl, "parquet": _read_parquet}
    for file in files:
        try:
            yield from readers.get(file.format, _read_document)(file, settings)
        except (OSError, RecordError) as error:
            yield _failed(file.path, file.path, error, file.size if file.format != "jsonl" else 0.0)


def _read_document(file: InputFile, settings: JobSettings) -> Iterator[Record]:
    with _open(file) as (stream, _):
        content = stream.read(settings.max_bytes + 1)
    if len(content) > settings.max_bytes:
        raise _too_large(settings)
    yield Record(file.path, file.path, file.format, content, blake3(content).digest(16), file.size)


def _read_jsonl(file: InputFile, settings: JobSettings) -> Iterator[Record]:
    with _open(file) as (stream, raw):
        position, row = 0, 0
        while line := stream.readline(settings.max_bytes + 1):
            row += 1
            too_large = len(line) > settings.max_bytes
            while too_large and line and not line.endswith(b"\n"):
                line = stream.readline(2**20)
            # A pipe has no position.
            before, position = position, raw.tell() if raw.seekable() else 0
            where, weight = f"{file.path}#{row}", position - before
            try:
                if too_large:
                    raise _too_large(settings)
                if line.strip():
                    yield _from_row(json.loads(line), where, weight, settings)
            except RecordError as error:
                yield _failed(where, where, error, weight)
            except (ValueError, RecursionError) as error:
                yield _failed(where, where, RecordError("bad row", f"not JSON: {error}"), weight, line)


def _read_parquet(file: InputFile, settings: JobSettings) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    text, id_ = settings.text_column, settings.id_column or "id"
    try:
        with _open(file) as (_, raw), pq.ParquetFile(raw, pre_buffer=False, **_as_dictionary(raw, text)) as table:
            weight = file.size / max(table.metadata.num_rows, 1)
            columns = [name for name in table.schema_arrow.names if name in (text, id_)]
            for group in range(table.num_row_groups):
                about = table.metadata.row_group(group)
                rows = max(1, min(_BATCH_ROWS, _BATCH_BYTES * about.num_rows // max(about.total_byte_size, 1)))
                for batch in table.iter_batches(rows, [group], columns=columns, use_threads=False):
                    for index in range(batch.num_rows):
                        row += 1
                        values = {name: _value(batch[name], index, settings) for name in batch.schema.names}
                        yield _from_row(values, f"{file.path}#{row}", weight, settings)
    except (pa.ArrowException, ValueError, OSError, KeyError) as error:
        # A KeyError: two columns of that name.
        raise RecordError("unreadable", f"after row {row}: {_reason(error)}") from None


def _as_dictionary(raw: IO[bytes], text: str) -> dict[str, Any]:
    """What has a column read as a dictionary: a long value that many rows share is in memory once.

    pyarrow refuses a file without such a column, or with a nested one.
    """
    import pyarrow.parquet as pq

    about = pq.read_metadata(raw)
    paths = {about.schema.column(number).path for number in range(about.num_columns)}
    return {"metadata": about} | ({"read_dictionary": [text]} if text in paths else {})


def _value(column: Any, index: int, settings: JobSettings) -> Any:
    """A value of a parquet column; a `RecordError` in its place if Python cannot hold it, or it is too large."""
    import pyarrow as pa

    try:
        cell = column[index]
        if isinstance(cell, pa.DictionaryScalar):
            cell = cell.value
        content = cell.as_buffer() if isinstance(cell, pa.StringScalar | pa.LargeStringScalar) else None
        if content is not None and len(content) > settings.max_bytes:
            return _too_large(settings)
        return cell.as_py()
    except (pa.ArrowException, ValueError, OverflowError) as error:
        return RecordError("bad row", _reason(error))


def _from_row(values: Any, where: str, weight: float, settings: JobSettings) -> Record:
    record_id = where
    try:
        if not isinstance(values, dict):
            raise RecordError("bad row", f"not a JSON object but {type(values).__name__}")
        given, text = values.get(settings.id_column or "id"), values.get(settings.text_column)
        if isinstance(given, str | int) and not isinstance(given, bool):
            record_id = str(given)
        elif settings.id_column is not None:
            raise RecordError("bad row", f"no string or integer in column {settings.id_column!r}")
        if isinstance(text, RecordError):
            raise text
        if not isinstance(text, str):
            has = f"it has {', '.join(map(repr, values)) or 'nothing'}"
            came = repr(text) if settings.text_column in values else has
            raise RecordError("bad row", f"no text in column {settings.text_column!r}: {came[:200]}")
        if len(text) > settings.max_bytes:
            raise _too_large(settings)
    except (RecordError, ValueError) as error:
        # A ValueError: an integer of more digits than Python prints.
        return _failed(record_id, where, error, weight)
    digest = blake3(text.encode("utf-8", "surrogatepass")).digest(16)
    return Record(record_id, where, "text", text, digest, weight)


@contextmanager
def _open(file: InputFile) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """The decompressed stream, and the file below it, whose position is the progress."""
    # Without O_NONBLOCK, opening a named pipe waits for its other end.
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY
    descriptor = sys.stdin.fileno() if file.path == STDIN else os.open(file.path, flags)
    with open(descriptor, "rb", closefd=file.path != STDIN) as raw:
        if file.path != STDIN and not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError("not a regular file but a folder, a pipe, a socket or a device")
        if file.compression is None:
            yield raw, raw
            return
        import pyarrow as pa

        # Unlike the gzip and zstandard modules, it reports a truncated file in both formats.
        yield io.BufferedReader(pa.CompressedInputStream(raw, file.compression)), raw


def _failed(record_id: str, where: str, error: Exception, weight: float, content: bytes = b"") -> Record:
    said = str(error) if isinstance(error, RecordError) else f"unreadable: {_reason(error)}"
    digest = blake3(content or said.encode("utf-8", "replace")).digest(16)
    return Record(record_id, where, "text", b"", digest, weight, said)


def _too_large(settings: JobSettings) -> RecordError:
    return RecordError("too large", f"more than {settings.max_bytes} bytes (--max-bytes)")


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
