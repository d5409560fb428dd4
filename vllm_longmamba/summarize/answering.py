"""From the text of a document to its row: fitting, the prompts it takes, and map-reduce."""

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from vllm_longmamba.summarize.fitting import room_of, sections, truncated
from vllm_longmamba.summarize.prompts import Prompt, PromptMaker
from vllm_longmamba.summarize.records import Completion, RecordError, Row
from vllm_longmamba.summarize.settings import Fit, JobSettings

# A level of map-reduce must shrink the text, or the levels never end.
_MIN_ROOM_IN_ANSWERS = 2

# Has prompts answered.
Ask = Callable[[list[Prompt]], Awaitable[list[Completion]]]
T = TypeVar("T")


class Backend(Protocol):
    """Answers prompts, many at a time."""

    # None where they are not known: the model's, and the tokens that a prompt and its answer may have.
    tokenizer: Any
    max_model_len: int | None
    # Prompts that should be under way at a time.
    concurrency: int

    async def complete(self, prompt: Prompt) -> Completion:
        """Answer one prompt.

        Raises:
            RecordError: this prompt cannot be answered.
            JobStoppedError: no prompt can be answered any more.
        """

    async def close(self) -> None:
        """End the engine, or the connection to others."""


class Answerer:
    """Knows which prompts a document takes; `limit` is how many tokens each may have, None where nobody can tell.

    Raises:
        ValueError: every document would fail: no tokenizer, no known length, or too little room.
    """

    def __init__(self, maker: PromptMaker, fit: Fit, max_tokens: int, limit: int | None) -> None:
        self.maker, self.limit = maker, limit
        self._fit, self._max_tokens = fit, max_tokens
        # One: fast tokenizers refuse to be used by two threads at a time.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prepare")
        if fit.mode != "error" and not getattr(maker.tokenizer, "is_fast", False):
            raise ValueError(
                f"--fit {fit.mode} needs a fast tokenizer of the model; name a folder that has one with --tokenizer"
            )
        if fit.mode != "error" and limit is None:
            raise ValueError(f"--fit {fit.mode}: the server does not say how much fits; pass --max-model-len")
        if maker.tokenizer is None or limit is None:
            return
        room = room_of(maker, limit)
        if fit.mode == "map-reduce" and room < _MIN_ROOM_IN_ANSWERS * max_tokens:
            raise ValueError(
                f"--fit map-reduce: a prompt has room for {room} tokens of text, which must be at least "
                f"{_MIN_ROOM_IN_ANSWERS} answers of {max_tokens}; raise --max-model-len, or lower --max-tokens"
            )

    def fits(self, prompt: Prompt) -> bool:
        """Whether a prompt has no more tokens than it may have; True where nobody can tell."""
        return self.limit is None or prompt.tokens <= self.limit

    async def fill(self, row: Row, document: str, ask: Ask) -> None:
        """Fill the row of a document with the answers to its prompts.

        Raises:
            RecordError: this document cannot be answered.
        """
        prompt = await self._prepared(self.maker.prompt, document)
        if self.limit is not None and not self.fits(prompt):
            if self._fit.mode == "error":
                fitting = f"{self.limit} fit beside {self._max_tokens} of answer; --fit truncate or map-reduce"
                raise RecordError("too long", f"{prompt.tokens} tokens of prompt, and {fitting}")
            if self._fit.mode == "truncate":
                cut = self._prepared(truncated, self.maker, document, self.limit, self._fit.drop)
                prompt, row.dropped_tokens = await cut
            else:
                prompt = await self._reduced(row, document, self.limit, ask)
        # It would stay in memory until the answer is there.
        del document
        (answer,) = await ask([prompt])
        row.count([answer])
        row.summary, row.finish_reason = answer.text, answer.finish_reason

    async def _reduced(self, row: Row, text: str, limit: int, ask: Ask) -> Prompt:
        """Ask about sections, then about their answers together, and so on until these fit in one prompt."""
        row.steps = []
        level, maker = 1, self.maker
        while True:
            answers = await ask(await self._prepared(_section_prompts, maker, text, limit))
            row.count(answers)
            for number, answer in enumerate(answers, 1):
                counts = {"prompt_tokens": answer.prompt_tokens, "output_tokens": answer.output_tokens}
                row.steps.append({"level": level, "section": number, **counts, "summary": answer.text})
            shorter = "\n\n".join(answer.text.strip() for answer in answers)
            if not shorter.strip():
                raise RecordError("map-reduce", f"all {len(answers)} sections of level {level} gave an empty answer")
            if level > 1 and len(shorter) >= len(text):
                raise RecordError("map-reduce", f"level {level} did not make the text shorter; lower --max-tokens")
            text, level = shorter, level + 1
            maker = self.maker.with_instruction(self._fit.reduce_instruction)
            prompt = await self._prepared(maker.prompt, text)
            if self.fits(prompt):
                return prompt

    async def _prepared(self, prepare: Callable[..., T], *given: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, prepare, *given)


def _section_prompts(maker: PromptMaker, text: str, limit: int) -> list[Prompt]:
    return [maker.prompt(section) for section in sections(maker, text, limit)]


def make_answerer(settings: JobSettings, tokenizer: Any, length: int | None) -> Answerer:
    """Who knows the prompts of a job's documents.

    Raises:
        ValueError: the settings do not suit the backend, or the template is wrong.
    """
    # Without a tokenizer, chat is what every OpenAI-compatible server has.
    has_template = tokenizer is None or bool(getattr(tokenizer, "chat_template", None))
    chat = has_template if settings.prompt_kind == "auto" else settings.prompt_kind == "chat"
    if chat and not has_template:
        if settings.base_url is None:
            raise ValueError(f"--prompt chat: the tokenizer of {settings.model} has no chat template")
        # The server has one of its own, which nobody can count with.
        tokenizer = None
    maker = PromptMaker(chat, settings.instruction, settings.template, tokenizer)
    max_tokens, length = settings.sampling.max_tokens, settings.max_model_len or length
    if length is not None and length <= max_tokens:
        raise ValueError(f"--max-tokens {max_tokens} leaves no room for a prompt in {length} tokens")
    return Answerer(maker, settings.fit, max_tokens, None if length is None else length - max_tokens)
