"""What goes through a job: records of the input, completions of the model, rows of the output, and what goes wrong."""

import time
from dataclasses import dataclass, field, fields
from typing import Any


class RecordError(Exception):
    """One record cannot be answered: it becomes an error row, and the job goes on.

    Args:
        kind: a few words by which the closing report groups errors, without a colon.
        detail: what is wrong with this record, and what to do.
    """

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(f"{kind}: {detail}")


class JobStoppedError(ConnectionError):
    """Nothing more can be answered (no server, a dead engine): the job ends, and can be resumed."""


class DiskFullError(OSError):
    """There is no room for another row. All rows so far are whole."""


@dataclass(frozen=True)
class Record:
    """One document of the input.

    Attributes:
        id: what the output calls it; unique within a job.
        where: the file, or `file#row` (rows count from 1), for messages.
        kind: how `content` becomes text: "text", "html" or "pdf".
        content: bytes of a file, or text of a row.
        digest: 16 bytes, hash of `content`, or of the error.
        weight: bytes of the input files that it stands for; adds up to their sizes.
        error: why there is no content, as "kind: detail".
    """

    id: str
    where: str
    kind: str
    content: bytes | str
    digest: bytes
    weight: float
    error: str | None = None


@dataclass(frozen=True)
class Completion:
    """What a model answered to one prompt; `finish_reason` is "stop" or "length"."""

    text: str
    prompt_tokens: int
    output_tokens: int
    finish_reason: str


@dataclass
class Row:
    """One row of the output: docs/summarize.md says what its columns hold."""

    id: str
    summary: str | None = None
    prompt_tokens: int = 0
    output_tokens: int = 0
    finish_reason: str | None = None
    seconds: float = 0.0
    error: str | None = None
    dropped_tokens: int = 0
    steps: list[dict[str, Any]] | None = None
    hash: str = ""

    def count(self, completions: list[Completion]) -> None:
        """Add the tokens of answers."""
        self.prompt_tokens += sum(completion.prompt_tokens for completion in completions)
        self.output_tokens += sum(completion.output_tokens for completion in completions)


COLUMNS = tuple(column.name for column in fields(Row))


@dataclass
class Admitted:
    """A record to answer, and its row; `number` counts them."""

    record: Record
    row: Row
    number: int
    started: float = field(default_factory=time.monotonic)
