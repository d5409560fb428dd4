"""Finds the input files of a job: folders, files and glob patterns, in a stable order, without keeping a list."""

import glob
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

STDIN = "-"
_FORMATS = {
    ".txt": "text",
    ".md": "text",
    ".markdown": "text",
    ".html": "html",
    ".htm": "html",
    ".xhtml": "html",
    ".pdf": "pdf",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
}
_KNOWN = f"known are {', '.join(_FORMATS)}, also with .gz or .zst"
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}


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

    Args:
        given: folders, files, glob patterns, and "-".
        stdin_format: "jsonl", or "text" for one document.
        exclude: files that are never inputs, such as the output.

    Raises:
        ValueError: something given does not exist, matches nothing, or has an unknown format.
    """

    def __init__(self, given: Sequence[str], stdin_format: str = "jsonl", exclude: Sequence[Path] = ()) -> None:
        self._given = list(given)
        self._stdin_format = stdin_format
        self._exclude = {path.resolve() for path in exclude}
        for name in given:
            if name == STDIN or Path(name).is_dir():
                continue
            if Path(name).is_file():
                if _file(name) is None:
                    raise ValueError(
                        f"{name}: cannot tell its format; known are {', '.join(_FORMATS)}, also with .gz or .zst"
                    )
            elif not glob.has_magic(name):
                raise ValueError(f"{name}: no such file or folder")
            elif next(glob.iglob(name, recursive=True), None) is None:
                raise ValueError(f"{name}: matches no file")
        self.total_bytes = self.total_files = 0
        for file in self:
            self.total_bytes += file.size
            self.total_files += 1
        if self.total_files == 0:
            raise ValueError(
                f"{' '.join(given)}: no file to read; known are {', '.join(_FORMATS)}, also with .gz or .zst"
            )

    def __iter__(self) -> Iterator[InputFile]:
        for name in self._given:
            if name == STDIN:
                yield InputFile(STDIN, self._stdin_format, None, 0)
            elif Path(name).exists():
                yield from self._below(name)
            else:
                for match in sorted(glob.iglob(name, recursive=True)):
                    if Path(match).is_file():
                        yield from self._below(match)

    def _below(self, name: str) -> Iterator[InputFile]:
        if Path(name).is_file():
            names: Iterator[str] = iter([name])
        else:
            names = _walk(name)
        for each in names:
            file = _file(each)
            if file is not None and Path(each).resolve() not in self._exclude:
                yield file


def open_stdin() -> int:
    """File descriptor of the bytes of standard input."""
    return sys.stdin.fileno()


def _walk(folder: str) -> Iterator[str]:
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith("."):
                yield str(Path(parent) / name)


def _file(path: str) -> InputFile | None:
    stem, suffix = os.path.splitext(path.lower())
    compression = _COMPRESSIONS.get(suffix)
    if compression is not None:
        suffix = os.path.splitext(stem)[1]
    format_ = _FORMATS.get(suffix)
    if format_ is None or (format_ == "parquet" and compression is not None):
        return None
    try:
        return InputFile(path, format_, compression, os.path.getsize(path))
    except OSError:
        # A dangling link, say: reading it gives the error row.
        return InputFile(path, format_, compression, 0)
