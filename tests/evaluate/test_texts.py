"""Texts and tokenizers: prompts have exactly the tokens asked for, whatever the tokenizer."""

from collections.abc import Callable
from pathlib import Path

import pytest
from example_modules import EXAMPLES
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from vllm_longmamba.evaluate.needles import needle_questions, passkey_questions
from vllm_longmamba.evaluate.texts import Book, Encoder, read_books

HAYSTACK = (EXAMPLES / "texts" / "haystack.txt").read_text()


def byte_encoder() -> Encoder:
    folder = EXAMPLES / "passkey-mamba2-4m"
    return Encoder(PreTrainedTokenizerFast.from_pretrained(folder))


def bpe_encoder(begin: bool) -> Encoder:
    """A tokenizer in the manner of GPT-2's, in which a space joins the word or digit behind it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=800,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    digits = " ".join(str(number % 10) for number in range(2000))
    tokenizer.train_from_iterator([HAYSTACK[:50_000], digits], trainer)
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return Encoder(PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>"))


ENCODERS = {"bytes": byte_encoder, "bpe": lambda: bpe_encoder(False), "bpe with bos": lambda: bpe_encoder(True)}


@pytest.mark.parametrize("make", ENCODERS.values(), ids=ENCODERS)
def test_prompt(make: Callable[[], Encoder]) -> None:
    encoder = make()
    haystack = encoder.encode(HAYSTACK)
    for question in [*passkey_questions([150, 1000], [0.0, 0.4, 1.0], [0]), *needle_questions([400], [0.3], [0], 3)]:
        prompt = encoder.prompt(question, haystack)
        assert len(prompt) == question.length
        text = encoder.decode(prompt).removeprefix("<s>")
        assert text.endswith(question.text().rstrip(" ")) or text.endswith(question.text())
        before = text.index(question.asked.text())
        assert all(needle.text() in text for needle in question.needles)
        assert abs(before / (len(text) - len(question.text())) - question.asked.depth) < 0.35
        piece = text[:before] or text[before + len(question.asked.text()) :]
        assert piece[:40] in HAYSTACK or question.task == "needles"


def test_prompt_of_a_fixed_place() -> None:
    encoder = byte_encoder()
    (question,) = passkey_questions([200], [0.25], [0])
    prompt = bytes(encoder.prompt(question, encoder.encode(HAYSTACK))).decode()
    needle = question.needles[0].text()
    room = 200 - len(needle) - len(question.text())
    assert prompt.index(needle) == round(0.25 * room)
    start = int(question.start * (len(HAYSTACK) - room + 1))
    assert prompt.replace(needle, "") == HAYSTACK[start : start + room] + question.text()


def test_space_before_the_answer() -> None:
    question = "\nThe pass key is "
    assert byte_encoder().encode_question(question) == list(question.encode())
    encoder = bpe_encoder(False)
    assert encoder.decode(encoder.encode_question(question)) == question.rstrip()


def test_prefix() -> None:
    assert byte_encoder().prefix == []
    assert bpe_encoder(False).prefix == []
    encoder = bpe_encoder(True)
    assert len(encoder.prefix) == 1
    (question,) = passkey_questions([300], [0.5], [0])
    prompt = encoder.prompt(question, encoder.encode(HAYSTACK))
    assert prompt[:1] == encoder.prefix
    assert encoder.prefix[0] not in prompt[1:]
    assert encoder.sizes({"book": [5, 6, 7]}) == {"book": 4}


@pytest.mark.parametrize(
    ("length", "tokens", "message"),
    [(60, 10_000, "a length of 60 tokens is too short.* at least 76"), (5000, 1000, "needs 4924 tokens of haystack")],
)
def test_prompt_refuses(length: int, tokens: int, message: str) -> None:
    encoder = byte_encoder()
    (question,) = passkey_questions([length], [0.5], [0])
    with pytest.raises(ValueError, match=message):
        encoder.prompt(question, encoder.encode(HAYSTACK)[:tokens])


def test_read_books(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("two")
    (tmp_path / "a.txt").write_text("one", encoding="utf-8")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "c.txt").write_text("drei ½", encoding="utf-8")
    (tmp_path / "notes.md").write_text("four")
    folder = [Book("a", "one"), Book("b", "two"), Book("c", "drei ½")]
    assert read_books([tmp_path]) == folder
    assert read_books([tmp_path / "notes.md", tmp_path / "more"]) == [Book("notes", "four"), folder[2]]
    assert Book("x", "one").digest == folder[0].digest != folder[1].digest


def test_read_books_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no \.txt file"):
        read_books([tmp_path])
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"a\.txt: texts must be UTF-8"):
        read_books([tmp_path])
    (tmp_path / "a.txt").write_text("one")
    with pytest.raises(ValueError, match="a came twice"):
        read_books([tmp_path, tmp_path / "a.txt"])
