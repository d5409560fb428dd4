"""From a document to its row, with a backend that counts."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from vllm_longmamba.summarize.answering import Answerer, Fit, check_fit
from vllm_longmamba.summarize.prompts import Prompt, PromptMaker
from vllm_longmamba.summarize.records import Completion, JobStoppedError, RecordError, Row

MAX_TOKENS = 10


class CountingBackend:
    """Answers with the first characters of a prompt, given by `length`."""

    chat = False
    max_model_len = None
    tokenizer = None

    def __init__(self, length: int = MAX_TOKENS, concurrency: int = 3) -> None:
        self.concurrency = concurrency
        self.length = length
        self.prompts: list[str] = []
        self.most_at_once = self._at_once = 0

    async def complete(self, prompt: Prompt) -> Completion:
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        self.prompts.append(prompt.text)
        await asyncio.sleep(0.001)
        self._at_once -= 1
        if "REFUSE" in prompt.text:
            raise RecordError("refused", "no")
        if "STOP" in prompt.text:
            raise JobStoppedError("gone")
        return Completion(prompt.text[: self.length], len(prompt.text), self.length, "length")

    async def close(self) -> None:
        pass


def answer(document: str, fit: Fit, tokenizer: Any, backend: CountingBackend, limit: int | None = 100) -> Row:
    maker = PromptMaker(False, "Q:", None, tokenizer)
    row = Row("id", "hash")

    async def in_thread(function: Callable[[PromptMaker], Any]) -> Any:
        return function(maker)

    async def run() -> None:
        await Answerer(backend, fit, MAX_TOKENS, limit).answer(row, lambda: document, in_thread)

    asyncio.run(run())
    return row


@pytest.mark.parametrize("mode", ["error", "truncate", "map-reduce"])
def test_what_fits(tokenizer: Any, mode: str) -> None:
    backend = CountingBackend()
    row = answer("x" * 96, Fit(mode), tokenizer, backend)
    assert backend.prompts == ["x" * 96 + "\n\nQ:"]
    assert (row.summary, row.prompt_tokens, row.output_tokens, row.finish_reason) == ("x" * 10, 100, 10, "length")
    assert (row.steps, row.dropped_tokens, row.error) == (None, 0, None)


def test_what_does_not_fit_is_an_error(tokenizer: Any) -> None:
    backend = CountingBackend()
    with pytest.raises(RecordError, match="too long: 101 tokens of prompt, and 100 fit beside 10 of answer"):
        answer("x" * 97, Fit("error"), tokenizer, backend)
    assert backend.prompts == []


def test_nobody_knows_what_fits() -> None:
    backend = CountingBackend()
    assert answer("x" * 500, Fit("error"), None, backend, limit=None).summary == "x" * 10


def test_truncated(tokenizer: Any) -> None:
    backend = CountingBackend()
    row = answer("a" * 100 + "b" * 100, Fit("truncate", "middle"), tokenizer, backend)
    assert backend.prompts == ["a" * 46 + "b" * 46 + "\n\nQ:"]
    assert row.dropped_tokens == 200 - 92


def test_map_reduce(tokenizer: Any) -> None:
    backend = CountingBackend()
    text = "".join(f"{number:04d}abcde." + " " for number in range(100))
    row = answer(text, Fit("map-reduce", reduce_instruction="R:"), tokenizer, backend)
    assert backend.most_at_once <= backend.concurrency
    steps = row.steps or []
    levels = [[step for step in steps if step["level"] == level] for level in (1, 2, 3)]
    assert len(levels[0]) >= 12
    assert len(levels[0]) > len(levels[1]) >= 2
    for level in levels:
        assert [step["section"] for step in level] == list(range(1, len(level) + 1))
    firsts = [prompt for prompt in backend.prompts if prompt.endswith("Q:")]
    assert "".join(prompt.removesuffix("\n\nQ:") for prompt in firsts) == text
    assert [step["summary"] for step in levels[0]] == [prompt[:10] for prompt in firsts]
    assert backend.prompts[-1].endswith("\n\nR:")
    assert row.summary == backend.prompts[-1][:10]
    assert row.prompt_tokens == sum(map(len, backend.prompts))
    assert row.output_tokens == 10 * len(backend.prompts) == 10 * (len(steps) + 1)


@pytest.mark.parametrize(
    ("length", "message"),
    [(0, "all 6 sections of level 1 gave an empty answer"), (92, "did not make the text shorter")],
)
def test_map_reduce_that_leads_nowhere(tokenizer: Any, length: int, message: str) -> None:
    with pytest.raises(RecordError, match=message):
        answer("x" * 500, Fit("map-reduce"), tokenizer, CountingBackend(length))


@pytest.mark.parametrize(("word", "error"), [("REFUSE", RecordError), ("STOP", JobStoppedError)])
@pytest.mark.parametrize("size", [50, 500])
def test_failures_come_out_as_they_are(tokenizer: Any, word: str, error: type[Exception], size: int) -> None:
    with pytest.raises(error):
        answer(f"{word} " * (size // len(word)), Fit("map-reduce"), tokenizer, CountingBackend())


def test_a_document_that_breaks_the_preparation() -> None:
    class Broken:
        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            raise MemoryError("too much")

    with pytest.raises(RecordError, match="preparation: MemoryError: too much"):
        answer("x", Fit(), Broken(), CountingBackend())


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
        check_fit(Fit(mode), maker, MAX_TOKENS, limit)
    else:
        with pytest.raises(ValueError, match=message):
            check_fit(Fit(mode), maker, MAX_TOKENS, limit)
