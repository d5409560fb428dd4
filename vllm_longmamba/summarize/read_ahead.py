"""An ordinary iterator that blocks, made asynchronous: a thread reads a few items ahead."""

import asyncio
import threading
from collections.abc import Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")
_ITEMS_AHEAD = 4


class ReadAhead(Generic[Item]):
    """Items of an iterator, read by a thread that may be abandoned while it waits for standard input.

    Args:
        items: what to read; used by the thread only.
    """

    def __init__(self, items: Iterator[Item]) -> None:
        self._items = items
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[Item | None, BaseException | None]] = asyncio.Queue()
        self._room = threading.Semaphore(_ITEMS_AHEAD)
        self._closed = False
        self._thread = threading.Thread(target=self._read, name="read-ahead", daemon=True)
        self._thread.start()

    async def next(self) -> Item:
        """The next item.

        Raises:
            StopAsyncIteration: there is none.
            Exception: what the iterator raised.
        """
        item, error = await self._queue.get()
        if error is not None:
            raise error
        self._room.release()
        return item  # type: ignore[return-value]

    def close(self) -> None:
        """Read no further."""
        self._closed = True
        self._room.release()
        # Not for ever: it may be waiting for standard input.
        self._thread.join(timeout=1.0)

    def _read(self) -> None:
        try:
            for item in self._items:
                self._room.acquire()
                if self._closed:
                    return
                self._put(item, None)
            self._put(None, StopAsyncIteration())
        except BaseException as error:
            self._put(None, error)

    def _put(self, item: Item | None, error: BaseException | None) -> None:
        if not self._closed:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (item, error))
