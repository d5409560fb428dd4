"""GPU time of calls in a CUDA graph."""

import statistics
from collections.abc import Callable

import torch


def microseconds(run: Callable[[int], object], calls: int) -> float:
    """Of one call: the median of five replays of a graph of all of them.

    Args:
        run: takes the number of the call, from 0.
        calls: how many the graph has.
    """
    run(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in range(calls):
            run(call)
    graph.replay()
    times = []
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / calls)
    return statistics.median(times)
