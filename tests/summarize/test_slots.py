"""Places by rank."""

import asyncio

from vllm_longmamba.summarize.slots import Slots


def test_low_ranks_first() -> None:
    order: list[int] = []
    at_once = most = 0

    async def work(slots: Slots, rank: int) -> None:
        nonlocal at_once, most
        async with slots.place(rank):
            at_once += 1
            most = max(most, at_once)
            order.append(rank)
            await asyncio.sleep(0.001)
            at_once -= 1

    async def run() -> None:
        slots = Slots(2)
        await asyncio.gather(*(work(slots, rank) for rank in (9, 8, 5, 3, 7, 1, 3)))

    asyncio.run(run())
    assert order == [9, 8, 1, 3, 3, 5, 7]
    assert most == 2


def test_a_cancelled_waiter_keeps_no_place() -> None:
    async def hold(slots: Slots, seconds: float) -> None:
        async with slots.place(0):
            await asyncio.sleep(seconds)

    async def run() -> None:
        slots = Slots(1)
        tasks = [asyncio.create_task(hold(slots, 0.01)) for _ in range(4)]
        await asyncio.sleep(0.001)
        tasks[0].cancel()
        tasks[1].cancel()
        await asyncio.sleep(0)
        # Its place is given, but it has not begun.
        tasks[2].cancel()
        await asyncio.wait_for(tasks[3], 1.0)
        await asyncio.wait_for(hold(slots, 0.0), 1.0)

    asyncio.run(run())
