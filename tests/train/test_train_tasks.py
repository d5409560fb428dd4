"""Tasks are written into the text as they are asked, and their digits are told apart."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from train.batches import Batches, make_batch
from train.corpus import Corpus
from train.settings import Settings, Stage, family_settings
from train.tasks import NAMES_FROM, RULER_NOISE, TASKS, UNKNOWN, TaskWriter

from vllm_longmamba.evaluate.needles import NAMES, NEEDLE, ONE_QUESTION, PASSKEY_NEEDLE, PASSKEY_QUESTION

SIZE = 641


@pytest.fixture(scope="module")
def writer(corpus: Corpus) -> TaskWriter:
    return TaskWriter(corpus)


def drawn(writer: TaskWriter, task: str, seed: int, size: int = SIZE) -> tuple[str, str, str]:
    """A sequence as text, its digits that can be known, and those that cannot."""
    tokens, kinds = writer.draw(np.random.default_rng(seed), task, size)
    assert len(tokens) == len(kinds) == size
    decode = writer.corpus.tokenizer.decode
    known, unknown = (decode(tokens[kinds == kind].tolist()) for kind in (TASKS.index(task) or 1, UNKNOWN))
    return decode(tokens.tolist()), known, unknown


def test_text_is_that_of_the_corpus(writer: TaskWriter) -> None:
    text, known, unknown = drawn(writer, "text", 0)
    assert text in writer.corpus.tokenizer.decode(writer.corpus.tokens.tolist())
    assert known == unknown == ""


@pytest.mark.parametrize("seed", range(5))
def test_passkey_is_worded_as_in_the_evaluation(writer: TaskWriter, seed: int) -> None:
    text, known, unknown = drawn(writer, "passkey", seed)
    assert re.fullmatch(r"[1-9]\d{4}", known)
    assert known == unknown
    assert PASSKEY_NEEDLE.format(number=known) in text
    assert text.endswith(PASSKEY_QUESTION + known + "\n")


@pytest.mark.parametrize("seed", range(5))
def test_needles_are_worded_as_in_the_evaluation(writer: TaskWriter, seed: int) -> None:
    text, known, unknown = drawn(writer, "needles", seed)
    statement, question = (
        re.escape(form.format(name="NAME", names="NAME", number="NUMBER"))
        .replace("NAME", "([a-z]+)", 1)
        .replace("NAME", "[a-z]+")
        .replace("NUMBER", r"(\d{5})")
        for form in (NEEDLE, ONE_QUESTION + "{number}\n")
    )
    stated, asked = re.findall(statement, text), re.findall(question, text)
    assert 2 <= len(dict(stated)) == len(stated) <= 4
    assert 1 <= len(asked) <= 2
    assert set(asked) <= set(stated)
    assert [number for _, number in stated] == re.findall(r"\d{5}", unknown)
    assert [number for _, number in asked] == re.findall(r"\d{5}", known)
    assert text.endswith(asked[-1][1] + "\n")


def test_a_prompt_is_tokenized_as_in_training(writer: TaskWriter) -> None:
    """The question, and then digits, as an engine sees them."""
    tokens, kinds = writer.draw(np.random.default_rng(0), "passkey", SIZE)
    question = writer.corpus.tokenizer.encode(PASSKEY_QUESTION).ids
    end = int(np.flatnonzero(kinds == TASKS.index("passkey"))[0])
    assert tokens[end - len(question) : end].tolist() == question


def test_recall_repeats_what_was_stated(writer: TaskWriter) -> None:
    mentions = 0
    for seed in range(20):
        _, known, unknown = drawn(writer, "recall", seed)
        numbers = {unknown[start : start + 5] for start in range(0, len(unknown), 5)}
        answers = [known[start : start + 5] for start in range(0, len(known), 5)]
        assert set(answers) <= numbers
        mentions += len(answers)
    assert mentions > 80


def test_recall_fits_into_short_sequences(writer: TaskWriter) -> None:
    for seed in range(20):
        drawn(writer, "recall", seed, size=257)


@pytest.mark.parametrize("seed", range(12))
def test_ruler_asks_as_in_lm_eval(writer: TaskWriter, seed: int) -> None:
    text, known, unknown = drawn(writer, "ruler", seed)
    needles = re.findall(r"One of the special magic numbers for ([a-z]+-[a-z]+) is: (\d{7})\.", text)
    assert "".join(number for _, number in needles) == unknown
    ending = re.search(
        r"\nWhat (is|are all) the special magic (numbers?) for (.+) mentioned in the provided text\? The special magic "
        r"\2 for \3 mentioned in the provided text (is|are) ([\d, ]+)\n$",
        text,
    )
    assert ending is not None
    queries, answers = re.split(r", and |, ", ending[3]), ending[5].split(", ")
    assert "".join(answers) == known
    assert answers == [number for query in queries for name, number in needles if name == query]
    assert text.startswith("A special magic number is" if len(answers) == 1 else "Some special magic numbers are")
    assert (ending[1] == "is") == (len(answers) == 1)


def test_ruler_has_all_of_its_tasks_and_haystacks(writer: TaskWriter) -> None:
    texts = [drawn(writer, "ruler", seed)[0] for seed in range(60)]
    answers = [len(re.findall(r"\d{7}", text.rsplit("\n", 2)[-2])) for text in texts]
    needles = [text.count("One of the special") for text in texts]
    assert set(zip(needles, answers, strict=True)) == {(1, 1), (4, 1), (4, 4)}
    assert 10 <= sum(2 * RULER_NOISE in text for text in texts) <= 30


def test_too_short_a_sequence_is_refused(writer: TaskWriter) -> None:
    with pytest.raises(ValueError, match=r"sequences of 20 tokens are \d+ too short"):
        drawn(writer, "passkey", 0, size=20)


def test_names_are_words_of_the_corpus(writer: TaskWriter) -> None:
    assert len(writer.names) > 1000
    assert len(set(writer.names) & set(NAMES)) >= 3
    assert len(writer.corpus.tokens) < NAMES_FROM


STAGES = (Stage(256, {"recall": 1.0}, 1.0, 0.5), Stage(512, {"text": 1.0, "passkey": 1.0}, 1.0, 1.0))


@pytest.fixture(scope="module")
def settings() -> Settings:
    return family_settings("mamba2", 512, steps=1, batch=2, length=512, stages=STAGES, seed=3)


def test_rows_hold_sequences_side_by_side(writer: TaskWriter, settings: Settings) -> None:
    batch = make_batch(writer, settings, 0, np.random.default_rng(0))
    assert batch.inputs.shape == batch.targets.shape == batch.kinds.shape == (2, 512)
    assert batch.seq_idx.tolist() == [0] * 256 + [1] * 256
    for start in (0, 256):
        ahead, here = batch.inputs[:, start + 1 : start + 256], batch.targets[:, start : start + 255]
        assert torch.equal(ahead, here)
    assert not torch.equal(batch.inputs[:, 256], batch.targets[:, 255])
    digits = torch.tensor(writer.digits)
    assert torch.isin(batch.targets[batch.kinds > 0], digits).all()


def test_stage_and_seed_decide_what_is_drawn(corpus: Corpus, settings: Settings) -> None:
    batches, again = Batches(corpus, settings), iter(Batches(corpus, settings))
    first = batches.load(workers=0)
    assert torch.equal(next(first).inputs, next(again).inputs)
    batches.stage[0] = 1
    second = next(first)
    assert second.stage == 1
    assert second.seq_idx.tolist() == [0] * 512
    other = next(iter(Batches(corpus, replace(settings, seed=4))))
    assert not torch.equal(other.inputs, next(iter(Batches(corpus, settings))).inputs)


def test_workers_draw_for_the_present_stage(corpus: Corpus, settings: Settings) -> None:
    batches = Batches(corpus, settings)
    drawn = batches.load(workers=2)
    first = [next(drawn) for _ in range(2)]
    assert [batch.stage for batch in first] == [0, 0]
    assert not torch.equal(first[0].inputs, first[1].inputs)
    batches.stage[0] = 1
    # two for each worker may have been ready
    assert [next(drawn).stage for _ in range(6)][-1] == 1
