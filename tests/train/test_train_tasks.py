"""The sequences that examples/train trains on."""

import lzma
import re
from pathlib import Path

import pytest
import torch
from train.books import SEPARATOR, read_books, windows
from train.nouns import NOUNS
from train.sentences import (
    NEEDLE_QUESTION,
    NEEDLE_STATEMENT,
    PASSKEY_QUESTION,
    PASSKEY_STATEMENT,
    write_sentences,
)
from train.tasks import Batch, make_batch, mix_tasks

from vllm_longmamba.evaluate import needles

CPU = torch.device("cpu")
LENGTH = 512
STATEMENT = re.compile(r"\nThe magic number of the (\w+) is (\d{5})\.\n")
ANSWER = re.compile(r"\nWhat is the magic number of the (\w+)\? The magic number of the \1 is (\d{5})\n")


def draw(
    shares: dict[str, float],
    text_file: Path,
    *,
    batch: int = 40,
    length: int = LENGTH,
    seed: int = 0,
    distractors: int = 0,
    foreign_words: float = 0.0,
) -> Batch:
    books = read_books(text_file, CPU, held_out_bytes=20_000)
    generator = torch.Generator().manual_seed(seed)
    sentences, mixture = write_sentences(NOUNS, CPU), mix_tasks(shares, CPU)
    return make_batch(books.train, sentences, mixture, batch, length, generator, distractors, foreign_words)


def text_of(tokens: torch.Tensor) -> str:
    return bytes(tokens.tolist()).decode("latin-1")


def test_wording_is_that_of_the_evaluation() -> None:
    assert needles.PASSKEY_NEEDLE.format(number="00000") == PASSKEY_STATEMENT
    assert f"{needles.PASSKEY_QUESTION}00000\n" == PASSKEY_QUESTION
    assert needles.NEEDLE.format(name="river", number="00000") == NEEDLE_STATEMENT.format(name="river")
    assert needles.ONE_QUESTION.format(names="river") + "00000\n" == NEEDLE_QUESTION.format(name="river")
    assert set(needles.NAMES) <= set(NOUNS)
    assert len(set(NOUNS)) == len(NOUNS)


def test_passkey_stands_anywhere_and_is_asked_for_last(text_file: Path) -> None:
    batch, depths = draw({"passkey": 1}, text_file), []
    for tokens, is_answer, is_random in zip(batch.tokens, batch.is_answer, batch.is_random, strict=True):
        text, key = text_of(tokens), text_of(tokens[is_answer])
        assert text_of(tokens[is_random]) == key
        assert text.endswith(f"{needles.PASSKEY_QUESTION}{key}\n")
        assert text.count(needles.passkey_needle(key)) == 1
        depths.append(text.index(needles.passkey_needle(key)) / LENGTH)
    assert min(depths) < 0.1
    assert max(depths) > 0.6
    assert batch.tokens.shape == (40, LENGTH + 1)


def test_needles_have_distinct_names_and_right_answers(text_file: Path) -> None:
    batch, asked_twice = draw({"needles": 1}, text_file), 0
    for tokens, is_answer, is_random in zip(batch.tokens, batch.is_answer, batch.is_random, strict=True):
        text = text_of(tokens)
        stated, answers = dict(STATEMENT.findall(text)), ANSWER.findall(text)
        assert 2 <= len(stated) <= 4
        assert len(STATEMENT.findall(text)) == len(stated)
        assert 1 <= len(answers) <= 2
        assert all(stated[name] == number for name, number in answers)
        assert text_of(tokens[is_answer]) == "".join(number for _, number in answers)
        assert text_of(tokens[is_random]) == "".join(stated.values())
        assert text.endswith(f"{answers[-1][1]}\n")
        asked_twice += len(answers) == 2
    assert 5 < asked_twice < 35


def test_recall_states_numbers_again(text_file: Path) -> None:
    batch = draw({"recall": 1}, text_file)
    answers = 0
    for tokens, is_answer, is_random in zip(batch.tokens, batch.is_answer, batch.is_random, strict=True):
        numbers = re.findall(r"(?:number of the \w+|pass key) is (\d{5})[\n.]", text_of(tokens))
        new = [number for place, number in enumerate(numbers) if number not in numbers[:place]]
        again = [number for place, number in enumerate(numbers) if number in numbers[:place]]
        assert text_of(tokens[is_random]) == "".join(new)
        assert text_of(tokens[is_answer]) == "".join(again)
        answers += len(again)
    assert answers > 3 * len(batch.tokens)


def test_text_is_left_alone(text_file: Path) -> None:
    book = text_file.read_bytes()
    batch = draw({"text": 1}, text_file, batch=5)
    assert all(bytes(tokens.tolist()) in book for tokens in batch.tokens)
    assert not (batch.is_answer | batch.is_random).any()


def test_mentions_that_do_not_fit_are_left_out(text_file: Path) -> None:
    batch = draw({"recall": 1}, text_file, length=300)
    assert batch.tokens.shape == (40, 301)
    assert batch.is_answer.any()
    for tokens, is_random in zip(batch.tokens, batch.is_random, strict=True):
        assert text_of(tokens[is_random]).isdigit()
        # no sentence is cut off
        assert is_random.sum() % 5 == 0


def test_distractors_are_numbers_that_nothing_can_know(text_file: Path) -> None:
    batch = draw({"text": 1}, text_file, batch=200, distractors=12)
    counts = []
    for tokens, is_random in zip(batch.tokens, batch.is_random, strict=True):
        numbers = re.findall(r"(?<= )\d{1,6}(?= )", text_of(torch.where(is_random, tokens, ord(" "))) + " ")
        counts.append(len(numbers))
        assert sum(map(len, numbers)) == is_random.sum()
    assert not batch.is_answer.any()
    assert min(counts) == 0
    assert 10 < max(counts) <= 12
    assert 4 < sum(counts) / len(counts) < 8


def test_distractors_leave_the_sentences_whole(text_file: Path) -> None:
    batch = draw({"needles": 1}, text_file, distractors=12)
    for tokens, is_answer, is_random in zip(batch.tokens, batch.is_answer, batch.is_random, strict=True):
        stated = dict(STATEMENT.findall(text_of(tokens)))
        assert 2 <= len(stated) <= 4
        assert all(number == stated[name] for name, number in ANSWER.findall(text_of(tokens)))
        assert is_answer.sum() % 5 == 0
        assert is_random.sum() >= 5 * len(stated)


def test_foreign_words_are_whole_letters(text_file: Path) -> None:
    batch = draw({"text": 1}, text_file, batch=200, distractors=12, foreign_words=0.5)
    words, numbers = [], 0
    for tokens, is_random in zip(batch.tokens, batch.is_random, strict=True):
        written = bytes(torch.where(is_random, tokens, ord(" ")).tolist()).decode("utf-8").split()
        words += [word for word in written if not word.isdigit()]
        numbers += len(written)
    assert all(1 <= len(word) <= 3 and all("\xc0" <= letter < "\u0480" for letter in word) for word in words)
    assert 0.4 < len(words) / numbers < 0.6


def test_too_many_distractors_are_refused(text_file: Path) -> None:
    with pytest.raises(ValueError, match="70 distractors do not fit into sequences of 512 bytes"):
        draw({"text": 1}, text_file, distractors=70)


def test_shares_and_seeds(text_file: Path) -> None:
    batch = draw({"text": 3, "passkey": 1, "needles": 0}, text_file, batch=400)
    has_key = batch.is_answer.any(1).float().mean()
    assert 0.18 < has_key < 0.32
    assert not any("magic" in text_of(tokens) for tokens in batch.tokens[:50])
    again = draw({"text": 3, "passkey": 1, "needles": 0}, text_file, batch=400)
    other = draw({"text": 3, "passkey": 1, "needles": 0}, text_file, batch=400, seed=1)
    assert torch.equal(again.tokens, batch.tokens)
    assert not torch.equal(other.tokens, batch.tokens)


def test_split(text_file: Path) -> None:
    batch = draw({"passkey": 1}, text_file, batch=6)
    parts = batch.split(3)
    assert [part.tokens.shape[0] for part in parts] == [2, 2, 2]
    assert torch.equal(torch.cat([part.tokens for part in parts]), batch.tokens)
    assert torch.equal(parts[1].is_answer, batch.is_answer[2:4])
    assert torch.equal(parts[2].is_random, batch.is_random[4:])


def test_wrong_shares_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\['poem'\]"):
        mix_tasks({"poem": 1.0}, CPU)
    with pytest.raises(ValueError, match="more than 0"):
        mix_tasks({"text": 0.0}, CPU)


def test_read_books(tmp_path: Path) -> None:
    text = b"First book.\n" * 900 + SEPARATOR + b"Second book.\n" * 100
    packed, plain = tmp_path / "text.txt.xz", tmp_path / "text.txt"
    packed.write_bytes(lzma.compress(text))
    plain.write_bytes(text)
    for path in (packed, plain):
        books = read_books(path, CPU, held_out_bytes=500)
        assert bytes(torch.cat([books.train, books.held_out]).tolist()) == text.replace(SEPARATOR, b"")
        assert len(books.held_out) == 500
    plain.write_bytes(b"short")
    with pytest.raises(ValueError, match="10,000 bytes, got 5"):
        read_books(plain, CPU)


def test_windows() -> None:
    text = torch.arange(100, dtype=torch.uint8)
    cut = windows(text, 50, 10, torch.Generator().manual_seed(0))
    assert cut.shape == (50, 10)
    assert (cut.diff(dim=1) == 1).all()
    assert cut[:, 0].unique().numel() > 20
