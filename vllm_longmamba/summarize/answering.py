"""From the text of a document to its row: fitting, the prompts it takes, and map-reduce.

`Answerer.steps` asks for nothing itself: it yields prompts and is sent their answers, so that the same lines serve
an engine, a server, and the passes of Ray.
"""

from collections.abc import Generator
from typing import Any, Protocol

from vllm_longmamba.summarize.fitting import room_of, sections, too_long, truncated
from vllm_longmamba.summarize.prompts import Prompt, PromptMaker
from vllm_longmamba.summarize.records import Completion, RecordError, Row
from vllm_longmamba.summarize.settings import Fit

# A level of map-reduce must shrink the text, or the levels never end.
_MIN_ROOM_IN_ANSWERS = 2

Steps = Generator[list[Prompt], list[Completion], None]


class Backend(Protocol):
    """Answers prompts, many at a time.

    Attributes:
        tokenizer: of the model; None where it is not known.
        max_model_len: tokens that a prompt and its answer may have; None where it is not known.
        concurrency: prompts that should be under way at a time.
        chat: whether prompts go as messages; matters to a server only.
    """

    tokenizer: Any
    max_model_len: int | None
    concurrency: int
    chat: bool

    async def complete(self, prompt: Prompt) -> Completion:
        """Answer one prompt.

        Raises:
            RecordError: this prompt cannot be answered.
            JobStoppedError: no prompt can be answered any more.
        """

    async def close(self) -> None:
        """Free what it holds. Prompts under way are dropped."""


class Answerer:
    """Knows which prompts a document takes.

    Args:
        maker: makes prompts.
        fit: what happens to documents that do not fit.
        max_tokens: longest answer.
        limit: tokens that a prompt may have, or None where nobody can tell.
    """

    def __init__(self, maker: PromptMaker, fit: Fit, max_tokens: int, limit: int | None) -> None:
        self._maker, self._fit, self._max_tokens, self._limit = maker, fit, max_tokens, limit

    def steps(self, document: str, row: Row) -> Steps:
        """Fill the row of a document.

        Yields:
            Prompts to answer; their completions must be sent in return.

        Raises:
            RecordError: this document cannot be answered.
        """
        prompt = self._maker.prompt(document)
        limit = self._limit
        if limit is None or not too_long(prompt, limit):
            del document
            completions = yield [prompt]
        elif self._fit.mode == "truncate":
            prompt, row.dropped_tokens = truncated(self._maker, document, limit, drop=self._fit.drop)
            del document
            completions = yield [prompt]
        elif self._fit.mode == "map-reduce":
            del prompt
            completions = yield from self._map_reduce(document, limit, row)
        else:
            raise RecordError(
                "too long",
                f"{len(prompt.token_ids or [])} tokens of prompt, and {limit} fit beside {self._max_tokens} of answer; "
                "--fit truncate or map-reduce",
            )
        _count(row, completions)
        row.summary, row.finish_reason = completions[0].text, completions[0].finish_reason

    def _map_reduce(
        self, text: str, limit: int, row: Row
    ) -> Generator[list[Prompt], list[Completion], list[Completion]]:
        """Ask about sections, then about their answers together, and so on until these fit in one prompt."""
        row.steps = []
        level, maker = 1, self._maker
        while True:
            asked = [maker.prompt(section) for section in sections(maker, text, limit)]
            answers = yield asked
            _count(row, answers)
            row.steps += [
                {
                    "level": level,
                    "section": number,
                    "prompt_tokens": answer.prompt_tokens,
                    "output_tokens": answer.output_tokens,
                    "summary": answer.text,
                }
                for number, answer in enumerate(answers, 1)
            ]
            shorter = "\n\n".join(answer.text.strip() for answer in answers)
            if not shorter.strip():
                raise RecordError("map-reduce", f"all {len(answers)} sections of level {level} gave an empty answer")
            if level > 1 and len(shorter) >= len(text):
                raise RecordError("map-reduce", f"level {level} did not make the text shorter; lower --max-tokens")
            text, level = shorter, level + 1
            maker = self._maker.with_instruction(self._fit.reduce_instruction)
            prompt = maker.prompt(text)
            if not too_long(prompt, limit):
                return (yield [prompt])


def advance(steps: Steps, completions: list[Completion] | None) -> list[Prompt]:
    """The next prompts of a document; none when its row is filled.

    Raises:
        RecordError: this document cannot be answered, whatever a tokenizer or a template makes of it.
    """
    try:
        return next(steps) if completions is None else steps.send(completions)
    except StopIteration:
        return []
    except RecordError:
        raise
    except Exception as error:
        raise RecordError("preparation", f"{type(error).__name__}: {error}") from None


def check_fit(fit: Fit, maker: PromptMaker, max_tokens: int, limit: int | None) -> None:
    """Check at the start what would fail on every document.

    Raises:
        ValueError: no tokenizer, no known length, or too little room.
    """
    if maker.tokenizer is not None and limit is not None:
        room = room_of(maker, limit)
        if fit.mode == "map-reduce" and room < _MIN_ROOM_IN_ANSWERS * max_tokens:
            raise ValueError(
                f"--fit map-reduce: a prompt has room for {room} tokens of text, which must be at least "
                f"{_MIN_ROOM_IN_ANSWERS} answers of {max_tokens}; raise --max-model-len, or lower --max-tokens"
            )
    if fit.mode == "error":
        return
    if maker.tokenizer is None or not getattr(maker.tokenizer, "is_fast", False):
        raise ValueError(
            f"--fit {fit.mode} needs a fast tokenizer of the model; name a folder that has one with --tokenizer"
        )
    if limit is None:
        raise ValueError(f"--fit {fit.mode}: the server does not say how much fits; pass --max-model-len")


def _count(row: Row, completions: list[Completion]) -> None:
    row.prompt_tokens += sum(completion.prompt_tokens for completion in completions)
    row.output_tokens += sum(completion.output_tokens for completion in completions)
