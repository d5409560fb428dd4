"""What answers prompts: the interface of the engine, a server, and Ray."""

from dataclasses import dataclass
from typing import Any, Protocol

from vllm_longmamba.summarize.prompts import Prompt
from vllm_longmamba.summarize.records import Completion


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled.

    Attributes:
        max_tokens: longest answer.
        temperature: 0 takes the likeliest token.
        top_p: share of the probability that is sampled from.
        seed: of every single request.
        stop: texts that end an answer.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()


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
