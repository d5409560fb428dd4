"""What does not fit in the model's length: cut off, or cut into sections."""

import re
from collections.abc import Iterator

from vllm_longmamba.summarize.prompts import Prompt, PromptMaker
from vllm_longmamba.summarize.records import RecordError

# Where a section may end, best first: paragraph, sentence, line, word.
_BORDERS = [re.compile(pattern) for pattern in (r"\n\s*\n", r"[.!?][\"'”’)\]]*\s+", r"\n", r"\s+")]
_MAX_ATTEMPTS = 8
_MARGIN_TOKENS = 4


def room_of(maker: PromptMaker, max_prompt_tokens: int) -> int:
    """Tokens that are left for a document beside the instruction.

    Args:
        maker: makes the prompts.
        max_prompt_tokens: tokens that a prompt may have.

    Raises:
        ValueError: none are left.
    """
    overhead = len(maker.prompt("").token_ids or [])
    room = max_prompt_tokens - overhead - _MARGIN_TOKENS
    if room < 1:
        raise ValueError(
            f"the instruction alone takes {overhead} tokens, and a prompt may have {max_prompt_tokens}; "
            "raise --max-model-len, or lower --max-tokens"
        )
    return room


def too_long(prompt: Prompt, max_prompt_tokens: int | None) -> bool:
    """Whether a prompt has more tokens than it may have; False where nobody can tell."""
    return max_prompt_tokens is not None and prompt.token_ids is not None and len(prompt.token_ids) > max_prompt_tokens


def truncated(maker: PromptMaker, document: str, max_prompt_tokens: int, *, drop: str) -> tuple[Prompt, int]:
    """Cut tokens out of a document until its prompt fits.

    Args:
        maker: makes the prompts; needs a fast tokenizer.
        document: the text.
        max_prompt_tokens: tokens that a prompt may have.
        drop: what goes: "end" or "middle".

    Returns:
        The prompt, and how many tokens of the document it lacks.

    Raises:
        RecordError: it cannot be made to fit.
    """
    spans = token_spans(maker, document)
    keep = min(room_of(maker, max_prompt_tokens), len(spans))
    for _ in range(_MAX_ATTEMPTS):
        first, last = _gap(document, spans, keep, drop)
        prompt = maker.prompt(document[:first] + document[last:])
        assert prompt.token_ids is not None
        excess = len(prompt.token_ids) - max_prompt_tokens
        if excess <= 0:
            return prompt, sum(first <= start < last for start, _ in spans)
        # Where text is cut, its tokens may change.
        keep -= excess
        if keep < 1:
            break
    raise RecordError("too long", f"cannot be cut to {max_prompt_tokens} tokens")


def sections(maker: PromptMaker, document: str, max_prompt_tokens: int) -> Iterator[str]:
    """Cut a document into sections of about equal length whose prompts fit, at paragraphs or sentences if possible.

    Args:
        maker: makes the prompts; needs a fast tokenizer.
        document: the text.
        max_prompt_tokens: tokens that a prompt may have.

    Yields:
        The sections; together they are the document.

    Raises:
        RecordError: a section cannot be made to fit.
    """
    spans = token_spans(maker, document)
    room = room_of(maker, max_prompt_tokens)
    first = start = 0
    while first < len(spans):
        left = len(spans) - first
        size = -(-left // -(-left // room))
        for _ in range(_MAX_ATTEMPTS):
            end = len(document) if size >= left else _border(document, start, spans[first + size][0])
            prompt = maker.prompt(document[start:end])
            assert prompt.token_ids is not None
            excess = len(prompt.token_ids) - max_prompt_tokens
            if excess <= 0:
                break
            size = min(size, left) - excess
            if size < 1:
                raise RecordError("too long", f"no section of it fits in {max_prompt_tokens} tokens")
        else:
            raise RecordError("too long", f"no section of it fits in {max_prompt_tokens} tokens")
        yield document[start:end]
        start = end
        while first < len(spans) and spans[first][0] < end:
            first += 1


def token_spans(maker: PromptMaker, document: str) -> list[tuple[int, int]]:
    """First and last character (exclusive) of each token of a text.

    Raises:
        ValueError: the tokenizer cannot tell.
    """
    if maker.tokenizer is None or not getattr(maker.tokenizer, "is_fast", False):
        raise ValueError("--fit truncate and map-reduce need a fast tokenizer of the model (tokenizer.json)")
    encoded = maker.tokenizer(document, add_special_tokens=False, return_offsets_mapping=True)
    return list(encoded["offset_mapping"])


def _gap(document: str, spans: list[tuple[int, int]], keep: int, drop: str) -> tuple[int, int]:
    """First and last character (exclusive) of what goes when `keep` tokens stay."""
    if keep >= len(spans):
        return len(document), len(document)
    if drop == "end":
        return spans[keep][0], len(document)
    head = (keep + 1) // 2
    tail = keep - head
    return spans[head][0], spans[len(spans) - tail][0] if tail else len(document)


def _border(document: str, start: int, end: int) -> int:
    """The best place to cut in the second half of [start, end), or end."""
    middle = (start + end) // 2
    for pattern in _BORDERS:
        ends = [match.end() for match in pattern.finditer(document, middle, end)]
        if ends and ends[-1] > start:
            return ends[-1]
    return max(end, start + 1)
