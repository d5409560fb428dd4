"""Turns the content of a record into text: HTML and PDF through libraries, in processes of their own."""

import io
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from vllm_longmamba.summarize.records import Record, RecordError

_BLOCKS = [
    "address",
    "article",
    "aside",
    "blockquote",
    "br",
    "dd",
    "div",
    "dl",
    "dt",
    "fieldset",
    "figcaption",
    "figure",
]
_BLOCKS += ["footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr", "li", "main", "nav", "ol", "p"]
_BLOCKS += ["pre", "section", "table", "tr", "ul"]
_NO_TEXT = ["script", "style", "noscript", "template", "head", "svg"]
_MAX_PROCESSES = 4


class TextExtractor:
    """Text of records. Parsers run in other processes: they are slow, and may crash on what they are given.

    Args:
        encoding: of text files.
    """

    def __init__(self, encoding: str = "utf-8") -> None:
        self._encoding = encoding
        self._lock = threading.Lock()
        self._pool: ProcessPoolExecutor | None = None

    def text(self, record: Record) -> str:
        """The document of a record. May be called from several threads.

        Raises:
            RecordError: it is not text of that encoding, cannot be parsed, or holds no text.
        """
        if isinstance(record.content, str):
            text = record.content
        elif record.kind == "text":
            text = self._decode(record.content)
        else:
            text = self._parse(record.kind, record.content)
        if not text.strip():
            hint = " (a PDF of scanned pages has none)" if record.kind == "pdf" else ""
            raise RecordError("empty", f"no text in {record.where}{hint}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RecordError("unreadable", f"half of a surrogate pair at character {error.start}") from None
        return text

    def close(self) -> None:
        """End the processes."""
        with self._lock:
            if self._pool is not None:
                self._pool.shutdown(wait=False, cancel_futures=True)
                self._pool = None

    def _decode(self, content: bytes) -> str:
        try:
            text = content.decode(self._encoding).removeprefix("\ufeff")
        except UnicodeDecodeError as error:
            raise RecordError(
                "unreadable", f"not {self._encoding} text at byte {error.start}; --encoding names another encoding"
            ) from None
        if "\0" in text:
            raise RecordError("unreadable", f"no text file: a zero byte at character {text.index(chr(0))}")
        return text

    def _parse(self, kind: str, content: bytes) -> str:
        parse = {"html": html_text, "pdf": pdf_text}[kind]
        # A crash fails all that the pool is doing; the second attempt tells who it was.
        for attempt in (1, 2):
            pool = self._started_pool()
            try:
                return pool.submit(parse, content).result()
            except BrokenProcessPool:
                self._drop(pool)
                if attempt == 2:
                    raise RecordError("unreadable", f"the {kind} parser crashed") from None
            except ImportError as error:
                raise RecordError("unreadable", f"{error}; pip install 'vllm-longmamba[summarize]'") from None
            except Exception as error:
                # Whatever a parser makes of a damaged file; it ends this record only.
                raise RecordError("unreadable", f"{kind}: {type(error).__name__}: {error}") from None
        raise AssertionError("unreachable")

    def _started_pool(self) -> ProcessPoolExecutor:
        with self._lock:
            if self._pool is None:
                self._pool = ProcessPoolExecutor(
                    min(_MAX_PROCESSES, os.cpu_count() or 1), multiprocessing.get_context("spawn"), _live_with_parent
                )
            return self._pool

    def _drop(self, pool: ProcessPoolExecutor) -> None:
        with self._lock:
            if self._pool is pool:
                self._pool = None
        pool.shutdown(wait=False)


def html_text(content: bytes) -> str:
    """The visible text of an HTML page; its encoding is the one it declares, or detected."""
    from bs4 import BeautifulSoup

    page = BeautifulSoup(content, "html.parser")
    for element in page(_NO_TEXT):
        element.decompose()
    for element in page(_BLOCKS):
        element.insert_before("\n")
        element.insert_after("\n")
    lines = (" ".join(line.split()) for line in page.get_text().splitlines())
    return _without_blank_runs(lines)


def pdf_text(content: bytes) -> str:
    """The text of a PDF, pages separated by an empty line.

    Raises:
        ValueError: it is encrypted with a password.
    """
    from pypdf import PdfReader

    reader = PdfReader(io.BytesIO(content))
    if reader.is_encrypted and not reader.decrypt(""):
        raise ValueError("encrypted with a password")
    return "\n\n".join(page.extract_text() for page in reader.pages)


def _without_blank_runs(lines: Iterable[str]) -> str:
    kept: list[str] = []
    for line in lines:
        if line or (kept and kept[-1]):
            kept.append(line)
    return "\n".join(kept).strip()


def _live_with_parent() -> None:
    """Initializer of a parser process."""
    # Ctrl-C lets running documents finish; the parent decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    # A killed parent cannot tell its pool to end.
    threading.Thread(target=end_with_parent, daemon=True).start()
