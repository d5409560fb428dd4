"""The loop of a job: reads ahead a little, answers many documents at a time, writes each answer at once."""

import asyncio
import itertools
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from vllm_longmamba.summarize.answering import Answerer, Backend, advance
from vllm_longmamba.summarize.progress import Progress
from vllm_longmamba.summarize.prompts import Prompt
from vllm_longmamba.summarize.records import Completion, DiskFullError, JobStoppedError, Record, RecordError, Row
from vllm_longmamba.summarize.store import Store
from vllm_longmamba.summarize.texts import TextExtractor

# Documents that are read and tokenized while the backend has all it may have.
_AHEAD = 4
# Bytes of documents under way at a time; one that is larger goes alone.
_BYTES_UNDER_WAY = 128 * 2**20
_SYNC_SECONDS = 1.0
# The output is written anew as often, or more seldom if that takes long.
_EXPORT_SECONDS, _EXPORT_SHARE = 10.0, 0.05


@dataclass
class Admitted:
    """A record to answer; `number` counts them."""

    record: Record
    row: Row
    number: int
    started: float = 0.0
    size: int = field(init=False)

    def __post_init__(self) -> None:
        self.size = sys.getsizeof(self.record.content)


class Runner:
    """Runs a job over records.

    Attributes:
        under_way: documents that are being answered.
        failure: what ended the job early.
    """

    def __init__(
        self,
        admitted: Iterator[Admitted],
        answerer: Answerer,
        extractor: TextExtractor,
        backend: Backend | None,
        store: Store,
        progress: Progress,
    ) -> None:
        self._admitted, self._answerer, self._extractor = admitted, answerer, extractor
        self._backend: Any = backend
        self._store, self._progress = store, progress
        self._read: asyncio.Queue[Admitted | BaseException | None] = asyncio.Queue()
        self._room = threading.Condition()
        self._asked: asyncio.PriorityQueue[tuple[int, int, Prompt, asyncio.Future[Completion]]]
        self._asked = asyncio.PriorityQueue()
        self._order = itertools.count()
        # One thread: fast tokenizers refuse to be used by two at a time.
        self._preparing = ThreadPoolExecutor(1, thread_name_prefix="prepare")
        self._tasks: list[asyncio.Task[None]] = []
        self._waiting = self._bytes = self._unfinished = self.under_way = 0
        self._at_end = self._stopped = False
        self.failure: JobStoppedError | DiskFullError | None = None

    def stop(self) -> None:
        """Take no further records; `run` ends when those under way are answered."""
        with self._room:
            self._stopped = True
            self._room.notify()
        while not self._read.empty():
            self._read.get_nowait()
        self._read.put_nowait(None)

    def abort(self) -> None:
        """Drop the records under way as well."""
        self.stop()
        for task in self._tasks:
            task.cancel()

    async def run(self) -> bool:
        """Answer the records.

        Returns:
            Whether all of them have a row now. If not, `failure` says why, or `stop` was called.
        """
        # A thread that may be abandoned while it waits for standard input.
        threading.Thread(target=self._read_records, args=(asyncio.get_running_loop(),), daemon=True).start()
        places = self._backend.concurrency
        self._tasks = [asyncio.create_task(self._work()) for _ in range(places + _AHEAD)]
        others = [asyncio.create_task(self._ask()) for _ in range(places)]
        others.append(asyncio.create_task(self._keep_current()))
        try:
            done, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_EXCEPTION)
            for error in [task.exception() for task in done if not task.cancelled()]:
                if isinstance(error, JobStoppedError | DiskFullError):
                    self.failure = error
                elif error is not None:
                    self.failure = JobStoppedError(f"{type(error).__name__}: {error}")
        finally:
            self.abort()
            for task in others:
                task.cancel()
            await asyncio.gather(*self._tasks, *others, return_exceptions=True)
            self._preparing.shutdown(wait=False, cancel_futures=True)
            self._extractor.close()
            self._progress.counts["dropped"] = self.under_way
        return self._at_end and self._unfinished == 0

    def finish(self, admitted: Admitted, error: str | None) -> None:
        """Write the row of a record."""
        admitted.row.error, admitted.row.seconds = error, round(time.monotonic() - admitted.started, 3)
        self._store.put(admitted.row)
        self._progress.answered(admitted.row, admitted.record.weight)

    async def _work(self) -> None:
        """Answer documents, one after the other."""
        # In functions of their own: no document stays in memory while a worker waits for the next.
        while await self._work_on_one():
            pass

    async def _work_on_one(self) -> bool:
        admitted = await self._read.get()
        if self._stopped or not isinstance(admitted, Admitted):
            # For the other workers.
            self._read.put_nowait(None)
            if isinstance(admitted, BaseException):
                raise admitted
            return False
        self.under_way += 1
        with self._room:
            self._waiting -= 1
            self._room.notify()
        await self._answer(admitted)
        self.under_way -= 1
        with self._room:
            self._unfinished -= 1
            self._bytes -= admitted.size
            self._room.notify()
        return True

    async def _answer(self, admitted: Admitted) -> None:
        error, completions = None, None
        admitted.started = time.monotonic()
        loop = asyncio.get_running_loop()
        try:
            steps = self._answerer.steps(await self._extractor.text(admitted.record), admitted.row)
            admitted.record = replace(admitted.record, content=b"")
            while prompts := await loop.run_in_executor(self._preparing, advance, steps, completions):
                completions = await self._completions(prompts, admitted.number)
        except RecordError as failure:
            error = str(failure)
        except (JobStoppedError, DiskFullError):
            raise
        except Exception as failure:
            error = f"failed: {type(failure).__name__}: {failure}"
        self.finish(admitted, error)

    async def _completions(self, prompts: list[Prompt], number: int) -> list[Completion]:
        """Answers in the order of the prompts. Sections of an earlier document go before those of later ones."""
        asked: list[asyncio.Future[Completion]] = [asyncio.Future() for _ in prompts]
        for prompt, future in zip(prompts, asked, strict=True):
            self._asked.put_nowait((number, next(self._order), prompt, future))
        try:
            return list(await asyncio.gather(*asked))
        finally:
            for future in asked:
                future.cancel()

    async def _ask(self) -> None:
        """Have prompts answered, one after the other."""
        while True:
            _, _, prompt, future = await self._asked.get()
            if not future.done():
                said: Any = (await asyncio.gather(self._backend.complete(prompt), return_exceptions=True))[0]
                if not future.done():
                    (future.set_result if isinstance(said, Completion) else future.set_exception)(said)
            # No prompt stays in memory while this waits for the next.
            del prompt, future

    async def _keep_current(self) -> None:
        """Let rows reach the disk, and the output show them, while the job runs."""
        due, written = time.monotonic() + _EXPORT_SECONDS, 0
        while True:
            await asyncio.sleep(_SYNC_SECONDS)
            await asyncio.to_thread(self._store.sync)
            rows, started = self._progress.counts["rows"], time.monotonic()
            if started < due or rows == written:
                continue
            # What is wrong with the output is said at the end; the rows are safe.
            with suppress(DiskFullError, ValueError, OSError):
                await asyncio.to_thread(self._store.export)
            written, ended = rows, time.monotonic()
            due = ended + max(_EXPORT_SECONDS, (ended - started) / _EXPORT_SHARE)

    def _read_records(self, loop: asyncio.AbstractEventLoop) -> None:
        last: BaseException | None = None
        try:
            for admitted in self._admitted:
                with self._room:
                    while not self._stopped and not self._has_room(admitted.size):
                        self._room.wait()
                    if self._stopped:
                        return
                    self._waiting += 1
                    self._unfinished += 1
                    self._bytes += admitted.size
                loop.call_soon_threadsafe(self._read.put_nowait, admitted)
            self._at_end = True
        except BaseException as error:
            last = error
        # The loop may be over.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(self._read.put_nowait, last)

    def _has_room(self, size: int) -> bool:
        return self._waiting < _AHEAD and (self._bytes == 0 or self._bytes + size <= _BYTES_UNDER_WAY)
