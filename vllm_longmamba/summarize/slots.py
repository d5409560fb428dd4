"""A semaphore that serves who came to the job first."""

import asyncio
import heapq
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Slots:
    """A number of places, given to the waiter with the lowest rank.

    The sections of a long document, and then their summaries, go before the documents behind it: its row comes early.

    Args:
        count: places.
    """

    def __init__(self, count: int) -> None:
        self._free = count
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._arrivals = itertools.count()

    @asynccontextmanager
    async def place(self, rank: int) -> AsyncIterator[None]:
        """A place while the block runs.

        Args:
            rank: the lower, the earlier; equal ranks in the order of their arrival.
        """
        if self._free and not self._waiting:
            self._free -= 1
        else:
            given: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            heapq.heappush(self._waiting, (rank, next(self._arrivals), given))
            try:
                await given
            except asyncio.CancelledError:
                if given.done() and not given.cancelled():
                    self._hand_on()
                raise
        try:
            yield
        finally:
            self._hand_on()

    def _hand_on(self) -> None:
        while self._waiting:
            given = heapq.heappop(self._waiting)[2]
            # Who was cancelled while waiting is still in the list.
            if not given.done():
                given.set_result(None)
                return
        self._free += 1
