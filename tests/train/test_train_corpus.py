"""Text files become a tokenizer and tokens."""

import lzma
from pathlib import Path

import numpy as np
import pytest
from train.corpus import Corpus, load_corpus, prepare, read_documents


def test_documents_of_plain_and_packed_files(tmp_path: Path) -> None:
    text = "First.\n\n<|doc|>\n  \n<|doc|>\nSecond: naïve.\n"
    (tmp_path / "plain.txt").write_text(text, encoding="utf-8")
    (tmp_path / "packed.txt.xz").write_bytes(lzma.compress(text.encode()))
    for name in ("plain.txt", "packed.txt.xz"):
        assert read_documents(tmp_path / name) == ["First.", "Second: naïve."]


def test_tokens_are_those_of_the_text(corpus: Corpus, text_file: Path) -> None:
    assert corpus.tokens.dtype == np.uint16
    assert corpus.tokens[-1] == 0
    assert corpus.tokenizer.decode(corpus.tokens.tolist()) == text_file.read_text(encoding="utf-8").strip()


def test_digits_are_single_tokens(corpus: Corpus) -> None:
    encoded = corpus.tokenizer.encode("is 48213.")
    assert [corpus.tokenizer.id_to_token(token) for token in encoded.ids][-6:] == [*"48213", "."]


def test_any_bytes_survive(corpus: Corpus) -> None:
    text = "\t日本 é 🙂\r\n"
    assert corpus.tokenizer.decode(corpus.tokenizer.encode(text).ids) == text


def test_number_of_tokens_is_limited(text_file: Path, tmp_path: Path) -> None:
    assert prepare([text_file, text_file], tmp_path, vocabulary=300, tokens=1000) == 1000
    assert len(load_corpus(tmp_path).tokens) == 1000


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"empty\.txt have no text"):
        prepare([tmp_path / "empty.txt"], tmp_path, vocabulary=300, tokens=10)
    with pytest.raises(ValueError, match="258 to 65536 tokens, got 70000"):
        prepare([tmp_path / "empty.txt"], tmp_path, vocabulary=70_000, tokens=10)
    with pytest.raises(ValueError, match=r"must hold tokens\.npy\.xz, write it with"):
        load_corpus(tmp_path)
