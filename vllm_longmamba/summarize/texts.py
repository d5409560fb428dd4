"""Turns the content of a record into text: HTML and PDF through libraries, in processes that can be killed."""

import asyncio
import io
import multiprocessing
import os
import resource
import signal
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from vllm_longmamba.summarize.records import Record, RecordError

_PROCESSES = min(4, os.cpu_count() or 1)
_SECONDS = 60.0
# Of a document whose parser ended through no fault of it.
_ATTEMPTS = 3
# Memory of a parser: so much, and a multiple of what it parses.
_BASE_BYTES, _BYTES_A_BYTE = 2**30, 12


class TextExtractor:
    """Text of records."""

    def __init__(self, encoding: str = "utf-8", max_bytes: int = 256 * 2**20, seconds: float = _SECONDS) -> None:
        self._encoding, self._max_bytes, self._seconds = encoding, max_bytes, min(seconds, _SECONDS)
        self._pool: Any = None

    async def text(self, record: Record) -> str:
        """The document of a record.

        Raises:
            RecordError: it could not be read, is not text of that encoding, cannot be parsed, or holds no text.
        """
        if record.error is not None:
            raise RecordError(*record.error.split(": ", 1))
        if isinstance(record.content, str):
            text = record.content
        elif record.kind == "text":
            text = self._decode(record.content)
        else:
            text = await self._parse(record.kind, record.content)
        if not text.strip():
            hint = " (a PDF of scanned pages has none)" if record.kind == "pdf" else ""
            raise RecordError("empty", f"no text in {record.where}{hint}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RecordError("unreadable", f"half of a surrogate pair at character {error.start}") from None
        return text

    def close(self) -> None:
        """Kill the processes."""
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()
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

    async def _parse(self, kind: str, content: bytes) -> str:
        from pebble import ProcessExpired

        parse = {"html": html_text, "pdf": pdf_text}[kind]
        for _ in range(_ATTEMPTS):
            try:
                task = self._parsers().schedule(_parse, (parse, content, self._max_bytes), timeout=self._seconds)
                text: str = await asyncio.wrap_future(task)
                return text
            except TimeoutError:
                raise RecordError("unreadable", f"{kind}: not parsed after {self._seconds:g} s") from None
            except BrokenProcessPool:
                # A process ended that had no work, and pebble gives up all of them.
                continue
            except ProcessExpired as error:
                # Who stops a job may tell all its processes to end, which says nothing of this document.
                if abs(error.exitcode) != signal.SIGTERM:
                    break
            except Exception as error:
                # Whatever a parser makes of a damaged file; it ends this record only.
                raise RecordError("unreadable", f"{kind}: {type(error).__name__}: {error}") from None
        raise RecordError("unreadable", f"the {kind} parser crashed")

    def _parsers(self) -> Any:
        from pebble import ProcessPool

        if self._pool is not None and not self._pool.active:
            self.close()
        if self._pool is None:
            spawn = multiprocessing.get_context("spawn")
            self._pool = ProcessPool(_PROCESSES, initializer=_ignore_interrupts, context=spawn)
        return self._pool


def _parse(parse: Callable[[bytes], str], content: bytes, max_bytes: int) -> str:
    limit = _BASE_BYTES + _BYTES_A_BYTE * len(content)
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
    text = parse(content)
    if len(text) > max_bytes:
        raise ValueError(f"its text has more than {max_bytes} characters (--max-bytes)")
    return text


def html_text(content: bytes) -> str:
    """The visible text of an HTML page, without its form fields; in UTF-8, or the encoding that it declares."""
    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.encoding import bytes_to_str, detect_encoding

    try:
        page = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        page = bytes_to_str(content, detect_encoding(content, from_html_meta=True) or "latin-1")
    # Of the extractors that were tried it alone takes linear time on every nesting, and knows blocks, cells and <pre>.
    return extract_plain_text(page, list_bullets=False, alt_texts=False, skip_elements=["svg", "template"])


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


def _ignore_interrupts() -> None:
    # Ctrl-C lets running documents finish; the parent decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
