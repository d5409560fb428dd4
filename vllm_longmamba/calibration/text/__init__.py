"""The text that models are calibrated on: the package's own sample, or a user's files."""

import json
import lzma
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from blake3 import blake3

SAMPLE = "sample.txt.xz"
_SEPARATOR = "\f"
# More is not read: a handful of sequences is drawn from it, and all of it is tokenized.
MOST_CHARACTERS = 16_000_000


@dataclass(frozen=True)
class Corpus:
    """Calibration text.

    Attributes:
        texts: one or more; each gives its share of the sequences.
        name: what they are, with a hash of their contents, as a table's metadata tell it.
    """

    texts: tuple[str, ...]
    name: str

    @property
    def characters(self) -> int:
        """Of all texts."""
        return sum(map(len, self.texts))


def sample_corpus() -> Corpus:
    """The sample that comes with the package: five texts of 80 kB, prose, dialogue and code (README.md beside it)."""
    content = lzma.decompress(resources.files(__name__).joinpath(SAMPLE).read_bytes()).decode()
    return Corpus(tuple(content.split(_SEPARATOR)), f"the sample of vllm_longmamba ({_hash(content)})")


def read_corpus(paths: list[Path], column: str = "text") -> Corpus:
    """Read a user's texts; without any, the package's sample.

    Args:
        paths: plain text (UTF-8), .jsonl (an object a line) or .parquet.
        column: the field or column of a .jsonl or .parquet file that holds the text.

    Returns:
        A text for each file, the first 16 million characters in all.

    Raises:
        ValueError: a file that is not of its kind, or has no such column.
        OSError: a file that cannot be read.
    """
    if not paths:
        return sample_corpus()
    parts, names, room = [], [], MOST_CHARACTERS
    for path in paths:
        part, content_hash = _read(path, column, room)
        room -= len(part)
        parts.append(part)
        names.append(f"{path.name} ({content_hash})")
    return Corpus(tuple(parts), ", ".join(names))


def _hash(text: str) -> str:
    return f"blake3 {blake3(text.encode()).hexdigest()[:16]}"


def _read(path: Path, column: str, room: int) -> tuple[str, str]:
    """A file's text and its hash."""
    try:
        text = _text(path, column, room)
        # It fails, too: JSON can spell half of a surrogate pair, which is no character and has no UTF-8.
        return text, _hash(text)
    except UnicodeError as error:
        raise ValueError(
            f"{path}: calibration text must be UTF-8 ({error}); convert it, or give another file"
        ) from error


def _text(path: Path, column: str, room: int) -> str:
    readers = {".jsonl": _json_lines, ".parquet": _parquet}
    if path.suffix not in readers:
        with path.open(encoding="utf-8") as file:
            return file.read(room)
    documents, length = [], 0
    for document in readers[path.suffix](path, column):
        if length >= room:
            break
        documents.append(document)
        length += len(document) + 2
    return "\n\n".join(documents)[:room]


def _json_lines(path: Path, column: str) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                content: Any = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: not a line of JSON ({error})") from error
            document = content.get(column) if isinstance(content, dict) else None
            if not isinstance(document, str):
                fields = ", ".join(content) if isinstance(content, dict) else "none"
                raise ValueError(
                    f"{path}, line {number}: no text in field {column!r}; the fields are {fields}: "
                    "name one with --text-column"
                )
            yield document


def _parquet(path: Path, column: str) -> Iterator[str]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ValueError(f"{path}: reading parquet needs pyarrow; install it with `pip install pyarrow`") from error
    try:
        file = ParquetFile(path)
    except ArrowException as error:
        raise ValueError(f"{path}: not a parquet file ({error})") from error
    with file:
        names = file.schema_arrow.names
        if column not in names:
            raise ValueError(
                f"{path}: no column {column!r}; the columns are {', '.join(names)}: name one with --text-column"
            )
        for batch in file.iter_batches(batch_size=256, columns=[column]):
            for document in batch.column(0).to_pylist():
                if document is not None:
                    yield str(document)
