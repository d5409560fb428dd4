"""Reads the input files record by record; what cannot be read is a record with an error."""

import io
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from blake3 import blake3

from vllm_longmamba.summarize.inputs import STDIN, InputFile, open_stdin
from vllm_longmamba.summarize.records import Record

_PARQUET_BATCH_ROWS = 64


@dataclass(frozen=True)
class SourceOptions:
    """How rows and files become records.

    Attributes:
        text_column: column of JSONL and parquet rows that holds the document.
        id_column: column that holds the id; None takes "id" where a row has it, and `file#row` elsewhere.
        max_bytes: longer documents are error rows, so that one file cannot fill the memory. Counts after decompression.
    """

    text_column: str = "text"
    id_column: str | None = None
    max_bytes: int = 256 * 2**20


def read_records(files: Iterable[InputFile], options: SourceOptions) -> Iterator[Record]:
    """All records of all files, in order, one at a time in memory.

    Args:
        files: what to read.
        options: columns and limits.

    Yields:
        Records; those with an error have no content. A file that breaks off gives its rows so far, and one error.
    """
    readers: dict[str, Callable[[InputFile, SourceOptions], Iterator[Record]]] = {
        "jsonl": _read_jsonl,
        "parquet": _read_parquet,
    }
    for file in files:
        try:
            yield from readers.get(file.format, _read_document)(file, options)
        except OSError as error:
            yield _failed(file.path, file.path, "unreadable", _reason(error), weight=0.0)


def _read_document(file: InputFile, options: SourceOptions) -> Iterator[Record]:
    try:
        with _open(file) as (stream, _):
            content = stream.read(options.max_bytes + 1)
    except OSError as error:
        yield _failed(file.path, file.path, "unreadable", _reason(error), weight=file.size)
        return
    if len(content) > options.max_bytes:
        yield _too_large(file.path, file.path, options, file.size)
        return
    yield Record(file.path, file.path, file.format, content, blake3(content).digest(16), file.size)


def _read_jsonl(file: InputFile, options: SourceOptions) -> Iterator[Record]:
    with _open(file) as (stream, raw):
        position, row = 0, 0
        while line := stream.readline(options.max_bytes + 1):
            row += 1
            where = f"{file.path}#{row}"
            too_large = len(line) > options.max_bytes
            while too_large and line and not line.endswith(b"\n"):
                line = stream.readline(2**20)
            before, position = position, _position(raw)
            if too_large:
                yield _too_large(where, where, options, position - before)
            elif line.strip():
                yield _from_line(line, where, position - before, options)


def _from_line(line: bytes, where: str, weight: float, options: SourceOptions) -> Record:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        return _failed(where, where, "bad row", f"not JSON: {error}", weight, line)
    if not isinstance(values, dict):
        return _failed(where, where, "bad row", f"not a JSON object but {type(values).__name__}", weight, line)
    return _from_row(values, where, weight, options)


def _read_parquet(file: InputFile, options: SourceOptions) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    try:
        with pq.ParquetFile(file.path, pre_buffer=False) as table:
            rows = table.metadata.num_rows
            wanted = {options.text_column, options.id_column or "id"}
            columns = [name for name in table.schema_arrow.names if name in wanted]
            for batch in table.iter_batches(_PARQUET_BATCH_ROWS, columns=columns):
                for values in batch.to_pylist():
                    row += 1
                    yield _from_row(values, f"{file.path}#{row}", file.size / rows, options)
    except pa.ArrowException as error:
        yield _failed(file.path, file.path, "unreadable", f"after row {row}: {_reason(error)}", weight=0.0)


def _from_row(values: dict[str, Any], where: str, weight: float, options: SourceOptions) -> Record:
    record_id = where
    given = values.get(options.id_column or "id")
    if isinstance(given, str | int) and not isinstance(given, bool):
        record_id = str(given)
    elif options.id_column is not None:
        return _failed(where, where, "bad row", f"no string or integer in column {options.id_column!r}", weight)
    text = values.get(options.text_column)
    if not isinstance(text, str):
        came = (
            f"it has {', '.join(map(repr, values)) or 'nothing'}" if options.text_column not in values else repr(text)
        )
        return _failed(record_id, where, "bad row", f"no text in column {options.text_column!r}: {came[:200]}", weight)
    if len(text) > options.max_bytes:
        return _too_large(record_id, where, options, weight)
    digest = blake3(text.encode("utf-8", "surrogatepass")).digest(16)
    return Record(record_id, where, "text", text, digest, weight)


@contextmanager
def _open(file: InputFile) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """The decompressed stream, and the file below it, whose position is the progress."""
    with open(open_stdin(), "rb", closefd=False) if file.path == STDIN else Path(file.path).open("rb") as raw:
        if file.compression is None:
            yield raw, raw
            return
        import pyarrow as pa

        # Unlike the gzip and zstandard modules, it reports a truncated file in both formats.
        yield io.BufferedReader(pa.CompressedInputStream(raw, file.compression)), raw


def _position(raw: IO[bytes]) -> int:
    try:
        return raw.tell()
    except OSError:
        # A pipe has none.
        return 0


def _failed(record_id: str, where: str, kind: str, detail: str, weight: float, content: bytes = b"") -> Record:
    error = f"{kind}: {detail}"
    digest = blake3(content or error.encode("utf-8", "replace")).digest(16)
    return Record(record_id, where, "text", b"", digest, weight, error)


def _too_large(record_id: str, where: str, options: SourceOptions, weight: float) -> Record:
    return _failed(record_id, where, "too large", f"more than {options.max_bytes} bytes (--max-bytes)", weight)


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
