"""Writes the rows of a store as the file that the user asked for; it is on the disk itself when a function returns."""

import json
import os
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from vllm_longmamba.summarize.records import COLUMNS

# Few rows at a time: their answers may be long.
_GROUP_ROWS = 64


def write_jsonl(path: Path, rows: Iterator[str]) -> None:
    """Write rows, each the JSON of a `Row`, as JSON lines."""
    with path.open("x", encoding="utf-8") as lines:
        lines.writelines(row + "\n" for row in rows)
        lines.flush()
        os.fsync(lines.fileno())


def write_parquet(path: Path, rows: Iterator[str]) -> None:
    """The same as a parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    number, text = pa.int64(), pa.string()
    counts = {"prompt_tokens": number, "output_tokens": number}
    step = pa.struct({"level": number, "section": number, **counts, "summary": text})
    types = {**counts, "seconds": pa.float64(), "dropped_tokens": number, "steps": pa.list_(step)}
    schema = pa.schema([(name, types.get(name, text)) for name in COLUMNS])
    with path.open("xb") as file:
        with pq.ParquetWriter(file, schema, compression="zstd") as writer:
            while some := [json.loads(row) for row in islice(rows, _GROUP_ROWS)]:
                writer.write_batch(pa.RecordBatch.from_pylist(some, schema=schema))
        file.flush()
        os.fsync(file.fileno())


WRITERS: dict[str, Callable[[Path, Iterator[str]], None]] = {
    ".jsonl": write_jsonl,
    ".ndjson": write_jsonl,
    ".parquet": write_parquet,
}
