"""From the content of a record to its text."""

import asyncio
import multiprocessing
import os
import signal
import time
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


def text(extractor: TextExtractor, record: Record) -> str:
    return asyncio.run(extractor.text(record))


def record(kind: str, content: bytes | str) -> Record:
    return Record("id", "place", kind, content, b"", 0.0)


def test_text_files() -> None:
    assert text(TextExtractor(), record("text", "\ufeffgrün".encode())) == "grün"
    assert text(TextExtractor("latin-1"), record("text", "grün".encode("latin-1"))) == "grün"
    assert text(TextExtractor(), record("text", "of a row")) == "of a row"


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
        text(TextExtractor(), record("text", content))


def test_html() -> None:
    page = """<html><head><title>T</title><style>p {}</style></head><body><script>var x;</script>
        <h1>A  head</h1><p>Some <b>bold</b>
        text.</p><ul><li>one</li><li>two</li></ul>after<br>break &amp; more<svg><text>no</text></svg></body></html>"""
    assert html_text(page.encode()) == "A head\n\nSome bold text.\n\n  one\n  two\nafter\nbreak & more"


@pytest.mark.parametrize(
    "page",
    [
        '<meta charset="latin-1"><p>gr\xfcn'.encode("latin-1"),
        "<p>gr\xfcn".encode(),
        "<p>gr\xfcn".encode("utf-16"),
        "\ufeff<p>gr\xfcn".encode(),
    ],
    ids=["declared", "utf-8", "utf-16", "mark"],
)
def test_the_encoding_of_a_page(page: bytes) -> None:
    assert html_text(page) == "gr\xfcn"


def test_cells_and_spaces_stay_apart() -> None:
    table = "<table><tr><td>2019</td><td>100</td><td>20</td></tr><tr><th>a</th><th>b</th></tr></table>"
    assert [line.split() for line in html_text(table.encode()).splitlines()] == [["2019", "100", "20"], ["a", "b"]]
    form = "before<select><option>one</option><option>two</option></select><button>x</button><button>y</button>after"
    assert not {"onetwo", "xy"} & set(html_text(form.encode()).split())
    assert html_text(b"<pre>a   b\n    c</pre>") == "a   b\n    c"


# A page of 4 MB of paragraphs, and every nesting that took other parsers minutes.
_BOMBS = {
    "paragraphs": "<p>some words</p>" * 250_000,
    "div": "<div>" * 300_000,
    "tables": "<table><tr><td>" * 50_000,
    "comments": "<!--" * 100_000,
    "bold": "<b>" * 30_000 + "<p>" * 3000,
    "links": "<a><p>" * 50_000,
}


@pytest.mark.parametrize("name", _BOMBS)
def test_pages_that_took_minutes(extractor: TextExtractor, name: str) -> None:
    """The limit of 60 s is far above what a linear parser takes, and far below what the others took."""
    found = text(extractor, record("html", f"<p>begin</p>{_BOMBS[name]}".encode()))
    assert found.startswith("begin")
    assert found.count("some words") == _BOMBS[name].count("some words")


def test_pdf() -> None:
    assert pdf_text(pdf(["first page", "second page"])) == "first page\n\nsecond page"


def test_parsers_in_other_processes(extractor: TextExtractor, monkeypatch: pytest.MonkeyPatch) -> None:
    assert text(extractor, record("pdf", pdf(["a page"]))) == "a page"
    with pytest.raises(RecordError, match="unreadable: pdf: "):
        text(extractor, record("pdf", b"%PDF-1.4 nonsense"))
    with pytest.raises(RecordError, match=r"empty: no text in place \(a PDF of scanned"):
        text(extractor, record("pdf", pdf([""])))
    monkeypatch.setattr(texts, "pdf_text", _crash)
    with pytest.raises(RecordError, match="unreadable: the pdf parser crashed"):
        text(extractor, record("pdf", b"poison"))
    assert text(extractor, record("html", b"<p>others go on")) == "others go on"


def test_parsers_that_others_end(extractor: TextExtractor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """While it has no work, as when memory is short; and in the middle of a document, as by who stops the job."""
    assert text(extractor, record("html", b"<p>before")) == "before"
    idle = [child for child in multiprocessing.active_children() if child.name == "pebble_pool_worker"]
    idle[0].kill()
    idle[0].join()
    # pebble notices it.
    time.sleep(0.5)
    assert text(extractor, record("html", b"<p>after")) == "after"
    monkeypatch.setattr(texts, "html_text", _ended_once)
    assert text(extractor, record("html", os.fsencode(tmp_path / "ended"))) == "parsed all the same"


def test_parsers_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a limit of time, of memory, of the text's length; and when the job does not wait any longer."""
    extractor = TextExtractor(seconds=1.0, max_bytes=1000)
    monkeypatch.setattr(texts, "html_text", _forever)
    with pytest.raises(RecordError, match="unreadable: html: not parsed after 1 s"):
        text(extractor, record("html", b"x"))
    monkeypatch.setattr(texts, "html_text", _swallow)
    with pytest.raises(RecordError, match="unreadable: html: MemoryError"):
        text(extractor, record("html", b"x"))
    monkeypatch.setattr(texts, "html_text", _long)
    with pytest.raises(RecordError, match=r"its text has more than 1000 characters \(--max-bytes\)"):
        text(extractor, record("html", b"x"))
    extractor.close()
    extractor = TextExtractor()
    monkeypatch.setattr(texts, "html_text", _forever)

    async def give_up() -> None:
        task = asyncio.create_task(extractor.text(record("html", b"x")))
        while extractor._pool is None:
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.wait([task])
        extractor.close()

    asyncio.run(asyncio.wait_for(give_up(), 30))


def _forever(content: bytes) -> str:
    signal.pause()
    return ""


def _swallow(content: bytes) -> str:
    return str(len(bytes(2**32)))


def _long(content: bytes) -> str:
    return "x" * 1001


def _ended_once(content: bytes) -> str:
    mark = Path(os.fsdecode(content))
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGTERM)
    return "parsed all the same"


def _crash(content: bytes) -> str:
    os.kill(os.getpid(), signal.SIGSEGV)
    return Path(os.fsdecode(content)).read_text()
