"""Finds the input files of a job: folders, files and glob patterns, in a stable order, without keeping a list."""

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

STDIN = "-"
_FORMATS = {
    **dict.fromkeys((".txt", ".md", ".markdown"), "text"),
    **dict.fromkeys((".html", ".htm", ".xhtml"), "html"),
    ".pdf": "pdf",
    **dict.fromkeys((".jsonl", ".ndjson"), "jsonl"),
    ".parquet": "parquet",
}
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_KNOWN = f"known are {', '.join(_FORMATS)}, also with .gz or .zst"


@dataclass(frozen=True)
class InputFile:
    """One file of the input.

    Attributes:
        path: as the user would write it: the given folder and the path below it; "-" for standard input.
        format: "text", "html", "pdf", "jsonl" or "parquet".
        compression: "gzip", "zstd" or None.
        size: bytes on the disk; 0 for standard input.
    """

    path: str
    format: str
    compression: str | None
    size: int


class Inputs:
    """The input files; iterating walks the folders anew.

    Raises:
        ValueError: something given does not exist, matches nothing, or has an unknown format.
    """

    def __init__(self, given: Sequence[str], exclude: Sequence[Path] = ()) -> None:
        self._given = given
        self._exclude = {os.path.realpath(path) for path in exclude}
        for name in given:
            if name == STDIN or os.path.isdir(name):
                continue
            if next(_paths(name), None) is None:
                raise ValueError(f"{name}: {'matches no file' if glob.has_magic(name) else 'no such file or folder'}")
            if os.path.lexists(name) and _file(name) is None:
                raise ValueError(f"{name}: cannot tell its format; {_KNOWN}")
        sizes = [file.size for file in self]
        self.total_files, self.total_bytes = len(sizes), sum(sizes)
        if not sizes:
            raise ValueError(f"{' '.join(given)}: no file to read; {_KNOWN}")

    def __iter__(self) -> Iterator[InputFile]:
        for name in self._given:
            if name == STDIN:
                yield InputFile(STDIN, "jsonl", None, 0)
                continue
            for each in _paths(name):
                file = _file(each)
                if file is not None and os.path.realpath(each) not in self._exclude:
                    yield file


def _paths(given: str) -> Iterator[str]:
    """The files of a folder, but hidden ones, or the matches of a pattern, in a stable order."""
    if os.path.isdir(given):
        errors: list[OSError] = []
        for parent, folders, files in os.walk(given, onerror=errors.append):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            yield from (str(Path(parent) / name) for name in sorted(files) if not name.startswith("."))
        # A folder that cannot be listed may hold documents: it is a document that cannot be read.
        yield from sorted(str(error.filename) for error in errors)
    elif os.path.lexists(given):
        yield given
    else:
        yield from (match for match in sorted(glob.iglob(given, recursive=True)) if not os.path.isdir(match))


def _file(path: str) -> InputFile | None:
    if os.path.isdir(path):
        return InputFile(path, "text", None, 0)
    stem, suffix = os.path.splitext(path.lower())
    compression = _COMPRESSIONS.get(suffix)
    if compression is not None:
        suffix = os.path.splitext(stem)[1]
    format_ = _FORMATS.get(suffix)
    if format_ is None or (format_ == "parquet" and compression is not None):
        return None
    # What is missing or no file (a dangling link, a named pipe) becomes an error row when it is read.
    size = os.path.getsize(path) if os.path.isfile(path) else 0
    return InputFile(path, format_, compression, size)
