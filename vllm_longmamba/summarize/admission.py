"""Which records of the input still need an answer."""

import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, replace

from blake3 import blake3

from vllm_longmamba.summarize.index import Index, Verdict
from vllm_longmamba.summarize.journal import DiskFullError
from vllm_longmamba.summarize.progress import Progress
from vllm_longmamba.summarize.records import Record, Row


@dataclass(frozen=True)
class Admitted:
    """A record to answer.

    Attributes:
        record: the record.
        row: its row, with id and hash, to be filled.
        replaces: whether the output has a row of this id, for another content.
    """

    record: Record
    row: Row
    replaces: bool


def admit(records: Iterator[Record], index: Index, settings_hash: bytes, progress: Progress) -> Iterator[Admitted]:
    """Leave out the records that have a row, and those that come again.

    A second record with the id of another one gets an error row under an id of its own; the same content under the same
    id is one record.

    Args:
        records: of the input, in a stable order.
        index: ids that have a row.
        settings_hash: hash of the settings that change answers.
        progress: counts what is left out.

    Raises:
        DiskFullError: no room for the index.
    """
    number = 0
    try:
        for original in records:
            # A file name or a row may hold what cannot be written as UTF-8.
            record = replace(original, id=original.id.encode("utf-8", "backslashreplace").decode())
            content_hash = _hash(settings_hash, record)
            verdict = index.admit(record.id, content_hash)
            if verdict is Verdict.CLASHING:
                record = _clash(record)
                verdict = index.admit(record.id, content_hash)
            if verdict is Verdict.DONE:
                progress.skipped(record.weight)
            elif verdict is Verdict.REPEATED:
                progress.repeated(record.weight)
            else:
                number += 1
                yield Admitted(record, Row(record.id, content_hash, number=number), verdict is Verdict.CHANGED)
    except sqlite3.OperationalError as error:
        raise DiskFullError(f"cannot write temporary files: {error}") from None


def _hash(settings_hash: bytes, record: Record) -> str:
    return blake3(settings_hash + record.digest).hexdigest(16)


def _clash(record: Record) -> Record:
    error = f"duplicate id: {record.id!r} was seen before with another text"
    return replace(record, id=f"{record.id} ({record.where})", content=b"", error=error)
