"""The haystacks of benchmarks/evidence.py: which documents, which pieces of them, and where prompts begin."""

import lzma
from pathlib import Path
from typing import Any

import pytest

from vllm_longmamba.evaluate.texts import Book

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "passkey-mamba2-4m"
KINDS: dict[str, Any] = {
    "novels": {"digits": [0, 1]},
    "numbers": {"digits": [5, 1000]},
    "sentences": {"repeat": "All is well. "},
}
PIECES = {"numbers": {"digits": [1, 1000], "piece": {"tokens": 10, "least_digits": 200}}}


@pytest.fixture(autouse=True)
def _benchmarks_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def _texts(documents: list[Book], kinds: dict[str, Any]) -> Any:
    """Texts of one token a character."""
    from support.evidence_texts import Texts

    return Texts(documents, kinds, lambda texts: [[ord(one) for one in text] for text in texts])


def _pieces(*documents: str) -> Any:
    return _texts([Book(str(number), text) for number, text in enumerate(documents)], PIECES)


def test_texts_are_told_apart_by_their_digits(tmp_path: Path) -> None:
    from support.evidence_texts import digits, read_documents

    (tmp_path / "one.txt.xz").write_bytes(lzma.compress(b"Call me Ishmael. " * 9 + b"\n<|doc|>\n" + b"In 1066, " * 9))
    (tmp_path / "two.txt").write_text("Born on 1 May 1901.")
    documents = read_documents(tmp_path)
    assert [book.name for book in documents] == ["one-0", "one-1", "two-0"]
    assert digits("a1b2") == 500

    texts = _texts(documents, KINDS)
    assert [book.name for book in texts.documents("novels")] == ["one-0"]
    assert [book.name for book in texts.documents("numbers")] == ["one-1", "two-0"]
    assert "".join(map(chr, texts.whole("numbers"))).count("1066") == 9
    assert texts.haystack("novels", 5) == texts.whole("novels")
    assert len(texts.haystack("sentences", 1000)) >= 1000
    assert set(texts.books(100)) == {"one-0"}


def test_numbers_are_pieces_with_many_digits() -> None:
    documents = [
        "1 it rains",
        "in 12 days1 it rains12345 and 1",
        "no digits at all",
        "it was 3.5on 10 May 12345678",
    ]
    texts = _pieces(*documents)
    expected = ["in 12 days", "12345 and ", "it was 3.5", "on 10 May "]
    assert "".join(map(chr, texts.pieces("numbers"))) == "".join(expected)


@pytest.mark.parametrize("length", [1, 15, 20, 45])
def test_a_prompt_begins_anywhere_in_the_pieces(length: int) -> None:
    texts = _pieces("in 12 daysit was 3.5")
    once, haystack = texts.pieces("numbers"), texts.haystack("numbers", length)
    starts = len(haystack) - length + 1
    prompts = [haystack[start : start + length] for start in range(starts)]
    assert starts > len(once)
    for start, prompt in enumerate(prompts):
        assert prompt == [once[(start + token) % len(once)] for token in range(length)]


def test_a_haystack_without_pieces_is_refused() -> None:
    with pytest.raises(ValueError, match=r"numbers: .* 10 tokens with at least 200 digits in 1,000"):
        _pieces("1 it rains").haystack("numbers", 5)


def test_tokens_of_digits() -> None:
    from support.evidence_texts import digit_tokens
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE)
    tokens = digit_tokens(lambda texts: tokenizer(texts, add_special_tokens=False)["input_ids"])
    assert [tokenizer.decode([token]) for token in tokens] == list("0123456789")
    pairs = lambda texts: [[int(text[at : at + 2]) for at in range(0, len(text), 2)] for text in texts]  # noqa: E731
    with pytest.raises(ValueError, match="a digit must be a token of its own"):
        digit_tokens(pairs)
