"""From the content of a record to its text."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_longmamba.summarize import texts
from vllm_longmamba.summarize.records import Record, RecordError
from vllm_longmamba.summarize.texts import TextExtractor, html_text, pdf_text

from .documents import pdf


@pytest.fixture
def extractor() -> Iterator[TextExtractor]:
    extractor = TextExtractor()
    yield extractor
    extractor.close()


def record(kind: str, content: bytes | str) -> Record:
    return Record("id", "place", kind, content, b"", 0.0)


def test_text_files() -> None:
    assert TextExtractor().text(record("text", "\ufeffgrün".encode())) == "grün"
    assert TextExtractor("latin-1").text(record("text", "grün".encode("latin-1"))) == "grün"
    assert TextExtractor().text(record("text", "of a row")) == "of a row"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("grün".encode("latin-1"), "unreadable: not utf-8 text at byte 2; --encoding"),
        (b"PK\0\0", "unreadable: no text file: a zero byte at character 2"),
        (b" \n", "empty: no text in place"),
        ("a\ud800", "unreadable: half of a surrogate pair at character 1"),
    ],
    ids=["encoding", "binary", "blank", "surrogate"],
)
def test_no_text(content: bytes | str, message: str) -> None:
    with pytest.raises(RecordError, match=message):
        TextExtractor().text(record("text", content))


def test_html() -> None:
    page = """<html><head><title>T</title><style>p {}</style></head><body><script>var x;</script>
        <h1>A  head</h1><p>Some <b>bold</b>
        text.</p><ul><li>one</li><li>two</li></ul>after<br>break &amp; more</body></html>"""
    assert html_text(page.encode()) == "A head\n\nSome bold\ntext.\n\none\n\ntwo\n\nafter\n\nbreak & more"
    assert html_text('<meta charset="latin-1"><p>grün'.encode("latin-1")) == "grün"


def test_pdf() -> None:
    assert pdf_text(pdf(["first page", "second page"])) == "first page\n\nsecond page"


def test_parsers_in_other_processes(extractor: TextExtractor, monkeypatch: pytest.MonkeyPatch) -> None:
    assert extractor.text(record("pdf", pdf(["a page"]))) == "a page"
    with pytest.raises(RecordError, match="unreadable: pdf: "):
        extractor.text(record("pdf", b"%PDF-1.4 nonsense"))
    with pytest.raises(RecordError, match=r"empty: no text in place \(a PDF of scanned"):
        extractor.text(record("pdf", pdf([""])))
    monkeypatch.setattr(texts, "pdf_text", _crash)
    with pytest.raises(RecordError, match="unreadable: the pdf parser crashed"):
        extractor.text(record("pdf", b"poison"))
    assert extractor.text(record("html", b"<p>others go on")) == "others go on"


def _crash(content: bytes) -> str:
    os.kill(os.getpid(), signal.SIGSEGV)
    return Path(os.fsdecode(content)).read_text()
