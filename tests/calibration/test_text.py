"""Tests of vllm_longmamba/calibration/text/."""

import json
import re
from pathlib import Path

import pytest
from blake3 import blake3

import vllm_longmamba.calibration.text as calibration_text
from vllm_longmamba.calibration.text import read_corpus, sample_corpus


def test_sample_corpus() -> None:
    corpus = sample_corpus()
    # Five sequences of 8192 tokens (Falcon Mamba) at 4.5 characters a token, one of each text, twice over.
    assert len(corpus.texts) == 5
    assert min(map(len, corpus.texts)) > 2 * 8192 * 4.5
    assert corpus.characters == sum(len(text) for text in corpus.texts)
    assert "Jerusalem" in corpus.texts[0]
    assert "import numpy as np" in corpus.texts[4]
    assert re.fullmatch(r"the sample of vllm_longmamba \(blake3 [0-9a-f]{16}\)", corpus.name)
    assert read_corpus([]) == corpus


def test_read_corpus_of_plain_text(tmp_path: Path) -> None:
    first, second = tmp_path / "one.txt", tmp_path / "two"
    first.write_text("Ærøskøbing\n", encoding="utf-8")
    second.write_text("ferry", encoding="utf-8")
    corpus = read_corpus([first, second])
    assert corpus.texts == ("Ærøskøbing\n", "ferry")
    hashes = [blake3(path.read_bytes()).hexdigest()[:16] for path in (first, second)]
    assert corpus.name == f"one.txt (blake3 {hashes[0]}), two (blake3 {hashes[1]})"


def test_read_corpus_of_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"id": n, "body": f"text {n}"}) for n in range(3)) + "\n\n")
    assert read_corpus([path], "body").texts == ("text 0\n\ntext 1\n\ntext 2",)
    with pytest.raises(ValueError, match=r"texts\.jsonl, line 1: no text in field 'text'; the fields are id, body"):
        read_corpus([path])
    path.write_text('{"text": "a"}\n{"text": 3}\n')
    with pytest.raises(ValueError, match="line 2: no text in field 'text'"):
        read_corpus([path])
    path.write_text('{"text": "a"}\n[1]\n')
    with pytest.raises(ValueError, match="line 2: no text in field 'text'; the fields are none"):
        read_corpus([path])
    path.write_text('{"text": "a"\n')
    with pytest.raises(ValueError, match="line 1: not a line of JSON"):
        read_corpus([path])
    path.write_text("[" * 100_000 + "\n")
    with pytest.raises(ValueError, match=r"texts\.jsonl, line 1: not a line of JSON"):
        read_corpus([path])


def test_read_corpus_of_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="reading parquet needs pyarrow")
    from pyarrow import parquet

    path = tmp_path / "texts.parquet"
    parquet.write_table(pyarrow.table({"id": [1, 2, 3], "body": ["one", None, "three"]}), path)
    assert read_corpus([path], "body").texts == ("one\n\nthree",)
    with pytest.raises(ValueError, match=r"texts\.parquet: no column 'text'; the columns are id, body: name one"):
        read_corpus([path])
    path.write_text("no parquet")
    with pytest.raises(ValueError, match=r"texts\.parquet: not a parquet file"):
        read_corpus([path])


def test_read_corpus_reads_no_more_than_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration_text, "MOST_CHARACTERS", 10)
    plain, lines = tmp_path / "plain", tmp_path / "lines.jsonl"
    plain.write_text("0123456")
    lines.write_text('{"text": "abc"}\n{"text": "def"}\nnot JSON, and not read\n')
    assert read_corpus([plain, plain]).texts == ("0123456", "012")
    assert read_corpus([plain, lines]).texts == ("0123456", "abc")
    lines.write_text('{"text": "a document of more"}\n')
    assert read_corpus([lines]).texts == ("a document",)


def test_read_corpus_refuses_what_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(ValueError, match=r"picture\.png: calibration text must be UTF-8"):
        read_corpus([path])
    for content in (b'{"text": "\xff"}', rb'{"text": "half a pair: \ud83d"}'):
        lines = tmp_path / "lines.jsonl"
        lines.write_bytes(content)
        with pytest.raises(ValueError, match=r"lines\.jsonl: calibration text must be UTF-8 .*; convert it, or give"):
            read_corpus([lines])
    with pytest.raises(FileNotFoundError):
        read_corpus([tmp_path / "gone.txt"])
