"""The loop of a job: reads ahead a little, answers many documents at a time, writes each answer at once."""

import asyncio
import copy
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from vllm_longmamba.summarize.admission import Admitted
from vllm_longmamba.summarize.answering import Answerer
from vllm_longmamba.summarize.journal import DiskFullError, Journal
from vllm_longmamba.summarize.progress import Progress
from vllm_longmamba.summarize.prompts import PromptMaker
from vllm_longmamba.summarize.read_ahead import ReadAhead
from vllm_longmamba.summarize.records import JobStoppedError, RecordError
from vllm_longmamba.summarize.texts import TextExtractor

# Documents that are read and tokenized while the backend has all it may have; each is in memory.
_PREPARED_AHEAD = 4
_PREPARING_THREADS = 4


class Runner:
    """Runs a job over records.

    Args:
        admitted: records to answer.
        answerer: answers documents.
        maker: makes prompts; each preparing thread gets a copy.
        extractor: makes text of records.
        journal: gets the rows.
        progress: is told what happens.
        concurrency: prompts under way at a time.
    """

    def __init__(
        self,
        admitted: Iterator[Admitted],
        answerer: Answerer,
        maker: PromptMaker,
        extractor: TextExtractor,
        journal: Journal,
        progress: Progress,
        concurrency: int,
    ) -> None:
        self._admitted = admitted
        self._answerer = answerer
        self._maker = maker
        self._extractor = extractor
        self._journal = journal
        self._progress = progress
        self._slots = asyncio.Semaphore(concurrency + _PREPARED_AHEAD)
        self._threads = ThreadPoolExecutor(_PREPARING_THREADS, thread_name_prefix="prepare")
        self._local = threading.local()
        self._tasks: set[asyncio.Task[None]] = set()
        self._admission: asyncio.Task[None] | None = None
        self.failure: JobStoppedError | DiskFullError | None = None

    def stop(self) -> None:
        """Take no further records; `run` ends when those under way are answered."""
        if self._admission is not None:
            self._admission.cancel()

    def abort(self) -> None:
        """Drop the records under way as well."""
        self.stop()
        for task in self._tasks:
            task.cancel()

    @property
    def under_way(self) -> int:
        """Documents that are admitted and have no row yet."""
        return len(self._tasks)

    async def run(self) -> bool:
        """Answer the records.

        Returns:
            Whether all of them have a row now. If not, `failure` says why, or `stop` was called.
        """
        reader = ReadAhead(self._admitted)
        self._admission = asyncio.create_task(self._admit_all(reader))
        try:
            await asyncio.wait([self._admission])
            while self._tasks:
                await asyncio.wait(self._tasks)
        finally:
            self.abort()
            reader.close()
            self._threads.shutdown(wait=False, cancel_futures=True)
            self._extractor.close()
        return not self._admission.cancelled() and self.failure is None and self._progress.dropped == 0

    async def _admit_all(self, reader: ReadAhead[Admitted]) -> None:
        while True:
            await self._slots.acquire()
            try:
                admitted = await reader.next()
            except StopAsyncIteration:
                return
            except Exception as error:
                self._fail(error)
                return
            task = asyncio.create_task(self._work(admitted))
            self._tasks.add(task)
            task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._slots.release()
        if task.cancelled():
            self._progress.dropped += 1
            return
        error = task.exception()
        if error is not None:
            self._progress.dropped += 1
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        if self.failure is None:
            if not isinstance(error, JobStoppedError | DiskFullError):
                error = JobStoppedError(f"{type(error).__name__}: {error}")
            self.failure = error
        self.abort()

    async def _work(self, admitted: Admitted) -> None:
        record, row = admitted.record, admitted.row
        started = time.monotonic()
        row.error = record.error
        if row.error is None:
            try:
                await self._answerer.answer(row, lambda: self._extractor.text(record), self._in_thread)
            except RecordError as error:
                row.error = str(error)
        row.seconds = round(time.monotonic() - started, 3)
        self._journal.append(row, replaces=admitted.replaces)
        self._progress.answered(row, record.weight)

    async def _in_thread(self, function: Callable[[PromptMaker], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, lambda: function(self._own_maker()))

    def _own_maker(self) -> PromptMaker:
        # Fast tokenizers refuse to be used by two threads at a time.
        if not hasattr(self._local, "maker"):
            self._local.maker = copy.copy(self._maker)
            self._local.maker.tokenizer = copy.deepcopy(self._maker.tokenizer)
        maker: PromptMaker = self._local.maker
        return maker
