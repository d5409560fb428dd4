"""From the text of a document to its row: fitting, the requests it takes, and map-reduce."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from vllm_longmamba.summarize.backends import Backend
from vllm_longmamba.summarize.fitting import room_of, sections, too_long, truncated
from vllm_longmamba.summarize.prompts import Prompt, PromptMaker
from vllm_longmamba.summarize.records import Completion, RecordError, Row
from vllm_longmamba.summarize.slots import Slots

FITS = ("error", "truncate", "map-reduce")
DROPS = ("end", "middle")
# A level of map-reduce must shrink the text, or the levels never end.
_MIN_ROOM_IN_ANSWERS = 2

Result = TypeVar("Result")
# Runs a function in a preparing thread, with that thread's own PromptMaker.
InThread = Callable[[Callable[[PromptMaker], Result]], Awaitable[Result]]


@dataclass(frozen=True)
class Fit:
    """What happens to documents that do not fit.

    Attributes:
        mode: "error", "truncate" or "map-reduce".
        drop: truncate: what goes, "end" or "middle".
        reduce_instruction: map-reduce: instruction for the summaries of sections; None takes that for documents.
    """

    mode: str = "error"
    drop: str = "end"
    reduce_instruction: str | None = None


class Answerer:
    """Answers documents through a backend, never more than `concurrency` prompts at a time.

    Args:
        backend: answers prompts.
        max_tokens: longest answer.
        fit: what happens to documents that do not fit.
        max_prompt_tokens: tokens that a prompt may have, or None where nobody can tell.
    """

    def __init__(self, backend: Backend, fit: Fit, max_tokens: int, max_prompt_tokens: int | None) -> None:
        self._backend = backend
        self._fit = fit
        self._max_tokens = max_tokens
        self._max_prompt_tokens = max_prompt_tokens
        self._slots = Slots(backend.concurrency)

    async def answer(self, row: Row, read: Callable[[], str], in_thread: InThread[Any]) -> None:
        """Fill the row of a document.

        Args:
            row: gets the answer.
            read: gives the document; may take long.
            in_thread: runs a function in a preparing thread.

        Raises:
            RecordError: this document cannot be answered.
            JobStoppedError: none can be answered any more.
        """
        try:
            document, prompt, dropped = await in_thread(lambda maker: self._prepare(maker, read()))
        except (RecordError, asyncio.CancelledError):
            raise
        except Exception as error:
            # Whatever a tokenizer or a parser makes of a strange document; it ends this one only.
            raise RecordError("preparation", f"{type(error).__name__}: {error}") from None
        row.dropped_tokens = dropped
        if prompt is not None:
            completion = await self._complete(prompt, row)
        else:
            completion = await self._map_reduce(document, row, in_thread)
        row.summary, row.finish_reason = completion.text, completion.finish_reason

    def _prepare(self, maker: PromptMaker, document: str) -> tuple[str, Prompt | None, int]:
        """(the document if it is cut into sections, its prompt otherwise, tokens dropped from it)."""
        prompt = maker.prompt(document)
        limit = self._max_prompt_tokens
        if limit is None or not too_long(prompt, limit):
            return "", prompt, 0
        if self._fit.mode == "truncate":
            fitted = truncated(maker, document, limit, drop=self._fit.drop)
            return "", fitted.prompt, fitted.dropped_tokens
        if self._fit.mode == "map-reduce":
            return document, None, 0
        raise RecordError(
            "too long",
            f"{len(prompt.token_ids or [])} tokens of prompt, and {limit} fit beside {self._max_tokens} of answer; "
            "--fit truncate or map-reduce",
        )

    async def _complete(self, prompt: Prompt, row: Row) -> Completion:
        async with self._slots.place(row.number):
            completion = await self._backend.complete(prompt)
        row.prompt_tokens += completion.prompt_tokens
        row.output_tokens += completion.output_tokens
        return completion

    async def _complete_all(self, prompts: list[Prompt], row: Row) -> list[Completion]:
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._complete(prompt, row)) for prompt in prompts]
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _map_reduce(self, document: str, row: Row, in_thread: InThread[Any]) -> Completion:
        """Answer sections, then their answers together, and so on until they fit in one prompt."""
        limit = self._max_prompt_tokens
        assert limit is not None
        row.steps = []
        text, level = document, 0
        while True:
            instruction = self._fit.reduce_instruction if level else None
            if level:
                prompt = await in_thread(partial(_whole, text=text, limit=limit, instruction=instruction))
                if prompt is not None:
                    return await self._complete(prompt, row)
            level += 1
            prompts = await in_thread(partial(_sections, text=text, limit=limit, instruction=instruction))
            answers = await self._complete_all(prompts, row)
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
            text = shorter


def check_fit(fit: Fit, maker: PromptMaker, max_tokens: int, max_prompt_tokens: int | None) -> None:
    """Check at the start what would fail on every document.

    Raises:
        ValueError: no tokenizer, no known length, or too little room.
    """
    if maker.tokenizer is not None and max_prompt_tokens is not None:
        room = room_of(maker, max_prompt_tokens)
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
    if max_prompt_tokens is None:
        raise ValueError(f"--fit {fit.mode}: the server does not say how much fits; pass --max-model-len")


def _whole(maker: PromptMaker, text: str, limit: int, instruction: str | None) -> Prompt | None:
    prompt = maker.with_instruction(instruction).prompt(text)
    return None if too_long(prompt, limit) else prompt


def _sections(maker: PromptMaker, text: str, limit: int, instruction: str | None) -> list[Prompt]:
    maker = maker.with_instruction(instruction)
    return [maker.prompt(section) for section in sections(maker, text, limit)]
