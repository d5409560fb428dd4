"""What does not fit in the model's length: cut off, or cut into sections."""

import re
from collections.abc import Iterator

from vllm_longmamba.summarize.prompts import Prompt, PromptMaker
from vllm_longmamba.summarize.records import RecordError

# Where a section may end, best first: paragraph, sentence, line, word.
_BORDERS = [re.compile(pattern) for pattern in (r"\n\s*\n", r"[.!?][\"'”’)\]]*\s+", r"\n", r"\s+")]
_MAX_ATTEMPTS = 8
_MARGIN_TOKENS = 4


def room_of(maker: PromptMaker, limit: int) -> int:
    """Tokens that are left for a document beside the instruction.

    Raises:
        ValueError: none are left.
    """
    overhead = maker.prompt("").tokens
    room = limit - overhead - _MARGIN_TOKENS
    if room < 1:
        raise ValueError(
            f"the instruction alone takes {overhead} tokens, and a prompt may have {limit}; "
            "raise --max-model-len, or lower --max-tokens"
        )
    return room


def truncated(maker: PromptMaker, document: str, limit: int, drop: str) -> tuple[Prompt, int]:
    """Cut tokens out of a document until its prompt fits; the prompt, and how many tokens of the document it lacks.

    Raises:
        RecordError: it cannot be made to fit.
    """
    spans = maker.spans(document)
    # A further span, so that every token has a next one.
    starts = [start for start, _ in spans] + [len(document)]
    keep = min(room_of(maker, limit), len(spans))
    for _ in range(_MAX_ATTEMPTS):
        if keep < 1:
            break
        tail = keep // 2 if drop == "middle" else 0
        first, last = starts[keep - tail], starts[len(spans) - tail]
        prompt = maker.prompt(document[:first] + document[last:])
        # Where text is cut, its tokens may change.
        excess = prompt.tokens - limit
        if excess <= 0:
            return prompt, sum(first <= start < last for start, _ in spans)
        keep -= excess
    raise RecordError("too long", f"cannot be cut to {limit} tokens")


def sections(maker: PromptMaker, document: str, limit: int) -> Iterator[str]:
    """Cut a document into sections of about equal length whose prompts fit, at paragraphs or sentences if possible.

    Raises:
        RecordError: a section cannot be made to fit.
    """
    starts = [start for start, _ in maker.spans(document)]
    room = room_of(maker, limit)
    first = start = 0
    while first < len(starts):
        left = len(starts) - first
        size = -(-left // -(-left // room))
        for _ in range(_MAX_ATTEMPTS):
            end = len(document) if size >= left else _border(document, start, starts[first + size])
            excess = maker.prompt(document[start:end]).tokens - limit
            size = min(size, left) - excess
            if excess <= 0 or size < 1:
                break
        if excess > 0:
            raise RecordError("too long", f"no section of it fits in {limit} tokens")
        yield document[start:end]
        start = end
        while first < len(starts) and starts[first] < end:
            first += 1


def _border(document: str, start: int, end: int) -> int:
    """The best place to cut in the second half of [start, end), or end."""
    for pattern in _BORDERS:
        ends = [match.end() for match in pattern.finditer(document, (start + end) // 2, end)]
        if ends and ends[-1] > start:
            return ends[-1]
    return max(end, start + 1)
