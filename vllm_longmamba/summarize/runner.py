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

    def begin(self) -> None:
        """Start its clock."""
        self.started = time.monotonic()

    def finish(self, store: Store, progress: Progress, error: str | None = None) -> None:
        """Write the row."""
        self.row.error, self.row.seconds = error, round(time.monotonic() - self.started, 3)
        store.put(self.row)
        progress.answered(self.row, self.record.weight)


class Reader:
    """Reads an iterator in a thread of its own, which may be abandoned while it waits for standard input.

    Args:
        admitted: what to read.

    Attributes:
        cut_off: whether `close` came before the end.
    """

    def __init__(self, admitted: Iterator[Admitted]) -> None:
        self._admitted = admitted
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Admitted | BaseException | None] = asyncio.Queue()
        self._change = threading.Condition()
        self._waiting = self._bytes = 0
        self._closed = self._at_end = self.cut_off = False
        threading.Thread(target=self._read, name="reader", daemon=True).start()

    async def next(self) -> Admitted | None:
        """The next record; None after the last one.

        Raises:
            Exception: what the iterator raised.
        """
        item = await self._queue.get()
        if isinstance(item, Admitted):
            with self._change:
                self._waiting -= 1
                self._change.notify()
            return item
        # For the other workers.
        self._queue.put_nowait(item)
        if item is None:
            return None
        raise item

    def done(self, admitted: Admitted) -> None:
        """Make room: a record is not in memory any more."""
        with self._change:
            self._bytes -= admitted.size
            self._change.notify()

    def close(self) -> None:
        """Read no further."""
        with self._change:
            self._closed = True
            self._change.notify()
        self.cut_off |= not self._at_end or self._waiting > 0
        while not self._queue.empty():
            self._queue.get_nowait()
        self._queue.put_nowait(None)

    def _read(self) -> None:
        last: BaseException | None = None
        try:
            for admitted in self._admitted:
                size = admitted.size
                with self._change:
                    self._change.wait_for(lambda size=size: self._closed or self._has_room(size))  # type: ignore[misc]
                    if self._closed:
                        return
                    self._waiting += 1
                    self._bytes += size
                self._put(admitted)
            self._at_end = True
        except BaseException as error:
            last = error
        self._put(last)

    def _has_room(self, size: int) -> bool:
        return self._waiting < _AHEAD and (self._bytes == 0 or self._bytes + size <= _BYTES_UNDER_WAY)

    def _put(self, item: Admitted | BaseException | None) -> None:
        # The loop may be over.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._take, item)

    def _take(self, item: Admitted | BaseException | None) -> None:
        if not self._closed:
            self._queue.put_nowait(item)


class Runner:
    """Runs a job over records.

    Args:
        admitted: records to answer.
        answerer: knows the prompts of a document.
        extractor: makes text of records.
        backend: answers prompts.
        store: gets the rows.
        progress: is told what happens.

    Attributes:
        under_way: documents that are admitted and have no row yet.
        failure: what ended the job early.
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
        self._answerer, self._extractor, self._backend = answerer, extractor, backend
        self._store, self._progress = store, progress
        self._reader = Reader(admitted)
        # One thread: fast tokenizers refuse to be used by two at a time.
        self._preparing = ThreadPoolExecutor(1, thread_name_prefix="prepare")
        self._asked: asyncio.PriorityQueue[tuple[int, int, Prompt, asyncio.Future[Completion]]]
        self._asked = asyncio.PriorityQueue()
        self._order = itertools.count()
        self._tasks: list[asyncio.Task[None]] = []
        self.under_way = 0
        self.failure: JobStoppedError | DiskFullError | None = None

    def stop(self) -> None:
        """Take no further records; `run` ends when those under way are answered."""
        self._reader.close()

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
        places = self._backend.concurrency
        self._tasks = [asyncio.create_task(self._work()) for _ in range(places + _AHEAD)]
        others = [asyncio.create_task(self._ask()) for _ in range(places)]
        others.append(asyncio.create_task(self._keep_current()))
        try:
            done, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                error = None if task.cancelled() else task.exception()
                if isinstance(error, JobStoppedError | DiskFullError):
                    self.failure = error
                elif error is not None:
                    self.failure = JobStoppedError(f"{type(error).__name__}: {error}")
        finally:
            complete = self.failure is None and self._progress.dropped == 0 and not self._reader.cut_off
            self.abort()
            for task in others:
                task.cancel()
            await asyncio.gather(*self._tasks, *others, return_exceptions=True)
            self._preparing.shutdown(wait=False, cancel_futures=True)
            self._extractor.close()
        return complete

    async def _work(self) -> None:
        """Answer documents, one after the other."""
        # In functions of their own: no document stays in memory while a worker waits for the next.
        while await self._work_on_one():
            pass

    async def _work_on_one(self) -> bool:
        if (admitted := await self._reader.next()) is None:
            return False
        self.under_way += 1
        try:
            await self._answer(admitted)
        except BaseException:
            self._progress.dropped += 1
            raise
        self.under_way -= 1
        self._reader.done(admitted)
        return True

    async def _answer(self, admitted: Admitted) -> None:
        error, completions = None, None
        admitted.begin()
        loop = asyncio.get_running_loop()
        try:
            steps = self._answerer.steps(await self._extractor.text(admitted.record), admitted.row)
            admitted.record = replace(admitted.record, content=b"")
            while prompts := await loop.run_in_executor(self._preparing, advance, steps, completions):
                completions = await self._completions(prompts, admitted.number)
        except RecordError as failure:
            error = str(failure)
        admitted.finish(self._store, self._progress, error)

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
            await self._ask_one()

    async def _ask_one(self) -> None:
        _, _, prompt, future = await self._asked.get()
        if future.done():
            return
        try:
            answer: Completion | Exception = await self._backend.complete(prompt)
        except (RecordError, JobStoppedError) as error:
            answer = error
        except Exception as error:
            answer = RecordError("failed", f"{type(error).__name__}: {error}")
        if isinstance(answer, Completion) and not future.done():
            future.set_result(answer)
        elif isinstance(answer, Exception) and not future.done():
            future.set_exception(answer)

    async def _keep_current(self) -> None:
        """Let rows reach the disk, and the output show them, while the job runs."""
        due, written = time.monotonic() + _EXPORT_SECONDS, self._progress.documents
        while True:
            await asyncio.sleep(_SYNC_SECONDS)
            await asyncio.to_thread(self._store.sync)
            if time.monotonic() < due or self._progress.documents == written:
                continue
            started, written = time.monotonic(), self._progress.documents
            # What is wrong with the output is said at the end; the rows are safe.
            with suppress(DiskFullError, ValueError, OSError):
                await asyncio.to_thread(self._store.export)
            ended = time.monotonic()
            due = ended + max(_EXPORT_SECONDS, (ended - started) / _EXPORT_SHARE)
