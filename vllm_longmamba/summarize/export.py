"""Writes the rows of a store as the file that the user asked for."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_longmamba.summarize.records import COLUMNS

_GROUP_ROWS = 1024
_GROUP_CHARACTERS = 8 * 2**20


def write_jsonl(path: Path, rows: Iterator[str]) -> None:
    """Write rows, each the JSON of a `Row`, as JSON lines; on the disk itself when it returns."""
    with path.open("x", encoding="utf-8") as lines:
        lines.writelines(row + "\n" for row in rows)
        lines.flush()
        os.fsync(lines.fileno())


def write_parquet(path: Path, rows: Iterator[str]) -> None:
    """The same as a parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = _schema()
    with path.open("xb") as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for some in _groups(rows):
            writer.write_batch(pa.RecordBatch.from_pylist(some, schema=schema))
        writer.close()
        file.flush()
        os.fsync(file.fileno())


def _groups(rows: Iterator[str]) -> Iterator[list[dict[str, Any]]]:
    some: list[dict[str, Any]] = []
    characters = 0
    for row in rows:
        some.append(json.loads(row))
        characters += len(row)
        if len(some) == _GROUP_ROWS or characters > _GROUP_CHARACTERS:
            yield some
            some, characters = [], 0
    if some:
        yield some


def _schema() -> Any:
    import pyarrow as pa

    number, text = pa.int64(), pa.string()
    counts = {"prompt_tokens": number, "output_tokens": number}
    step = pa.struct([("level", number), ("section", number), *counts.items(), ("summary", text)])
    types = {**counts, "seconds": pa.float64(), "dropped_tokens": number, "steps": pa.list_(step)}
    return pa.schema([(name, types.get(name, text)) for name in COLUMNS])
