"""The loop of a job: reads ahead a little, answers many documents at a time, writes each answer at once."""

import asyncio
import itertools
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial

from pebble import concurrent

from vllm_longmamba.summarize.answering import Answerer, Backend
from vllm_longmamba.summarize.progress import Progress
from vllm_longmamba.summarize.prompts import Prompt
from vllm_longmamba.summarize.records import Admitted, Completion, DiskFullError, JobStoppedError, RecordError
from vllm_longmamba.summarize.store import Store
from vllm_longmamba.summarize.texts import TextExtractor

# Documents that are read and tokenized while the backend has all it may have.
_AHEAD = 4
# Bytes of documents under way at a time; one that is larger goes alone.
_BYTES_UNDER_WAY = 128 * 2**20
_SYNC_SECONDS = 1.0
# The output is written anew as often, or more seldom if that takes long.
_EXPORT_SECONDS, _EXPORT_SHARE = 10.0, 0.05

# In a daemon thread, which may be abandoned while it waits for standard input.
_next_in_thread = concurrent.thread(next)


async def next_record(admitted: Iterator[Admitted]) -> Admitted | None:
    """The next record, None at the end; others may run, and the wait be cancelled, while it is looked for."""
    record: Admitted | None = await asyncio.wrap_future(_next_in_thread(admitted, None))
    return record


class Runner:
    """Runs a job over records.

    Attributes:
        under_way: documents that are being answered.
    """

    def __init__(
        self,
        admitted: Iterator[Admitted],
        answerer: Answerer,
        extractor: TextExtractor,
        backend: Backend,
        store: Store,
        progress: Progress,
    ) -> None:
        self._admitted, self._answerer, self._extractor = admitted, answerer, extractor
        self._backend, self._store, self._progress = backend, store, progress
        self._asked: asyncio.PriorityQueue[tuple[int, int, Prompt, asyncio.Future[Completion]]]
        self._asked = asyncio.PriorityQueue()
        self._order = itertools.count()
        # Told whenever there may be room for another document.
        self._room = asyncio.Condition()
        self._bytes = self.under_way = 0

    def stop(self) -> None:
        """Take no further records; `run` ends when those under way are answered."""
        self._reading.cancel()

    def abort(self) -> None:
        """Drop the records under way as well."""
        self._running.cancel()

    async def run(self) -> bool:
        """Answer the records.

        Returns:
            Whether all of them have a row now; False after `stop` or `abort`.

        Raises:
            JobStoppedError: nothing more can be answered.
            DiskFullError: nothing more can be written.
        """
        self._running = asyncio.create_task(self._answer_all())
        helpers = [asyncio.create_task(self._ask()) for _ in range(self._backend.concurrency)]
        helpers.append(asyncio.create_task(self._keep_current()))
        try:
            return await self._running
        except asyncio.CancelledError:
            # By `abort`.
            return False
        except ExceptionGroup as group:
            error = group.exceptions[0]
            if isinstance(error, JobStoppedError | DiskFullError):
                raise error from None
            raise JobStoppedError(f"{type(error).__name__}: {error}") from error
        finally:
            for task in helpers:
                task.cancel()
            await asyncio.gather(*helpers, return_exceptions=True)
            self._extractor.close()
            self._progress.counts["dropped"] = self.under_way

    async def _answer_all(self) -> bool:
        async with asyncio.TaskGroup() as documents:
            self._reading = documents.create_task(self._read(documents))
        return not self._reading.cancelled()

    async def _read(self, documents: asyncio.TaskGroup) -> None:
        """Begin documents, each when there is room for it."""
        while (admitted := await next_record(self._admitted)) is not None:
            size = sys.getsizeof(admitted.record.content)
            async with self._room:
                await self._room.wait_for(partial(self._has_room, size))
            self._bytes += size
            self.under_way += 1
            documents.create_task(self._answer(admitted, size))

    def _has_room(self, size: int) -> bool:
        is_light = self._bytes == 0 or self._bytes + size <= _BYTES_UNDER_WAY
        return is_light and self.under_way < self._backend.concurrency + _AHEAD

    async def _answer(self, admitted: Admitted, size: int) -> None:
        """Write the row of a document."""
        row = admitted.row
        row.error = await self._fill(admitted)
        row.seconds = round(time.monotonic() - admitted.started, 3)
        self._store.put(row)
        self._progress.answered(row, admitted.record.weight)
        self._bytes -= size
        self.under_way -= 1
        async with self._room:
            self._room.notify()

    async def _fill(self, admitted: Admitted) -> str | None:
        """Fill the row of a document; why it cannot be filled."""
        try:
            ask = partial(self._completions, admitted.number)
            await self._answerer.fill(admitted.row, await self._text(admitted), ask)
        except RecordError as failure:
            return str(failure)
        except JobStoppedError:
            raise
        except Exception as failure:
            return f"failed: {type(failure).__name__}: {failure}"
        return None

    async def _text(self, admitted: Admitted) -> str:
        """The document of a record, which keeps nothing of it."""
        text = await self._extractor.text(admitted.record)
        admitted.record = replace(admitted.record, content=b"")
        return text

    async def _completions(self, number: int, prompts: list[Prompt]) -> list[Completion]:
        """Answers in the order of the prompts. Sections of an earlier document go before those of later ones."""
        asked: list[asyncio.Future[Completion]] = [asyncio.Future() for _ in prompts]
        for prompt, future in zip(prompts, asked, strict=True):
            self._asked.put_nowait((number, next(self._order), prompt, future))
        try:
            return await asyncio.gather(*asked)
        finally:
            for future in asked:
                future.cancel()

    async def _ask(self) -> None:
        """Have prompts answered, one after the other."""
        while True:
            _, _, prompt, future = await self._asked.get()
            if not future.done():
                try:
                    completion = await self._backend.complete(prompt)
                except Exception as error:
                    # Who asked may have given up meanwhile.
                    if not future.done():
                        future.set_exception(error)
                else:
                    if not future.done():
                        future.set_result(completion)
            # No prompt stays in memory while this waits for the next.
            del prompt, future

    async def _keep_current(self) -> None:
        """Let rows reach the disk, and the output show them, while the job runs."""
        due, written = time.monotonic() + _EXPORT_SECONDS, 0
        while True:
            await asyncio.sleep(_SYNC_SECONDS)
            await asyncio.to_thread(self._store.sync)
            rows, started = self._progress.counts["rows"], time.monotonic()
            if started >= due and rows != written:
                # What is wrong with the output is said at the end; the rows are safe.
                with suppress(ValueError, OSError):
                    await asyncio.to_thread(self._store.export)
                written, ended = rows, time.monotonic()
                due = ended + max(_EXPORT_SECONDS, (ended - started) / _EXPORT_SHARE)
