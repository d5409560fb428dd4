"""From a document to its row, with a model that counts."""

import asyncio
from typing import Any

import pytest

from vllm_longmamba.summarize.answering import Answerer
from vllm_longmamba.summarize.prompts import Prompt, PromptMaker
from vllm_longmamba.summarize.records import Completion, RecordError, Row
from vllm_longmamba.summarize.settings import Fit

MAX_TOKENS = 10


class Model:
    """Answers with the first characters of a prompt, given by `length`."""

    def __init__(self, length: int = MAX_TOKENS) -> None:
        self.length = length
        self.prompts: list[str] = []

    async def ask(self, prompts: list[Prompt]) -> list[Completion]:
        texts = [prompt.text for prompt in prompts]
        self.prompts += texts
        return [Completion(text[: self.length], len(text), self.length, "length") for text in texts]


def answer(document: str, fit: Fit, tokenizer: Any, model: Model, limit: int | None = 100) -> Row:
    row = Row("id")
    answerer = Answerer(PromptMaker(False, "Q:", None, tokenizer), fit, MAX_TOKENS, limit)
    asyncio.run(answerer.fill(row, document, model.ask))
    return row


@pytest.mark.parametrize("mode", ["error", "truncate", "map-reduce"])
def test_what_fits(tokenizer: Any, mode: str) -> None:
    model = Model()
    row = answer("x" * 96, Fit(mode), tokenizer, model)
    assert model.prompts == ["x" * 96 + "\n\nQ:"]
    assert (row.summary, row.prompt_tokens, row.output_tokens, row.finish_reason) == ("x" * 10, 100, 10, "length")
    assert (row.steps, row.dropped_tokens, row.error) == (None, 0, None)


def test_what_does_not_fit_is_an_error(tokenizer: Any) -> None:
    model = Model()
    with pytest.raises(RecordError, match="too long: 101 tokens of prompt, and 100 fit beside 10 of answer"):
        answer("x" * 97, Fit("error"), tokenizer, model)
    assert model.prompts == []


def test_nobody_knows_what_fits() -> None:
    model = Model()
    assert answer("x" * 500, Fit("error"), None, model, limit=None).summary == "x" * 10


def test_truncated(tokenizer: Any) -> None:
    model = Model()
    row = answer("a" * 100 + "b" * 100, Fit("truncate", "middle"), tokenizer, model)
    assert model.prompts == ["a" * 46 + "b" * 46 + "\n\nQ:"]
    assert row.dropped_tokens == 200 - 92


def test_map_reduce(tokenizer: Any) -> None:
    model = Model()
    text = "".join(f"{number:04d}abcde." + " " for number in range(100))
    row = answer(text, Fit("map-reduce", reduce_instruction="R:"), tokenizer, model)
    steps = row.steps or []
    levels = [[step for step in steps if step["level"] == level] for level in (1, 2, 3)]
    assert len(levels[0]) >= 12
    assert len(levels[0]) > len(levels[1]) >= 2
    for level in levels:
        assert [step["section"] for step in level] == list(range(1, len(level) + 1))
    firsts = [prompt for prompt in model.prompts if prompt.endswith("Q:")]
    assert "".join(prompt.removesuffix("\n\nQ:") for prompt in firsts) == text
    assert [step["summary"] for step in levels[0]] == [prompt[:10] for prompt in firsts]
    assert model.prompts[-1].endswith("\n\nR:")
    assert row.summary == model.prompts[-1][:10]
    assert row.prompt_tokens == sum(map(len, model.prompts))
    assert row.output_tokens == 10 * len(model.prompts) == 10 * (len(steps) + 1)


@pytest.mark.parametrize(
    ("length", "message"),
    [(0, "all 6 sections of level 1 gave an empty answer"), (92, "did not make the text shorter")],
)
def test_map_reduce_that_leads_nowhere(tokenizer: Any, length: int, message: str) -> None:
    with pytest.raises(RecordError, match=message):
        answer("x" * 500, Fit("map-reduce"), tokenizer, Model(length))


@pytest.mark.parametrize(
    ("mode", "with_tokenizer", "limit", "message"),
    [
        ("error", False, None, None),
        ("error", True, 30, None),
        ("truncate", True, 30, None),
        ("map-reduce", True, 28, None),
        ("map-reduce", True, 27, "room for 19 tokens of text, which must be at least 2 answers of 10"),
        ("error", True, 8, "the instruction alone takes 4 tokens"),
        ("truncate", False, 100, "--fit truncate needs a fast tokenizer"),
        ("truncate", True, None, "does not say how much fits; pass --max-model-len"),
    ],
)
def test_check_fit(tokenizer: Any, mode: str, with_tokenizer: bool, limit: int | None, message: str | None) -> None:
    maker = PromptMaker(False, "Q:", None, tokenizer if with_tokenizer else None)
    if message is None:
        Answerer(maker, Fit(mode), MAX_TOKENS, limit)
    else:
        with pytest.raises(ValueError, match=message):
            Answerer(maker, Fit(mode), MAX_TOKENS, limit)
