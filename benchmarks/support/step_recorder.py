"""Functions for a worker of vLLM: decode steps by the clock, and kernels of decode and prefill by the profiler."""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Steps in front of those that are timed, and those behind them that may be profiled.
SKIPPED = 8
PROFILED = 12
# Replays of a step's CUDA graph, one after the other.
REPLAYS = 20
# Steps that may hold fewer requests, because some began or ended earlier.
MARGIN = 64

# Name of a kernel (or copy), begin and end in microseconds.
Event = tuple[str, float, float]


def start_profile() -> Any:
    """A profiler of what the GPU does from now on; None without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
    profile.start()
    return profile


def stop_profile(profile: Any) -> list[Event]:
    """What ran on the GPU since `start_profile`, which returned ``profile``."""
    import torch

    if profile is None:
        return []
    torch.cuda.synchronize()
    profile.stop()
    return [
        (event.name, event.time_range.start, event.time_range.end)
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]


def kernel_times(events: list[Event], units: int) -> dict[str, Any]:
    """What the GPU did, of one of ``units`` equal parts.

    Returns:
        gpu: seconds in which a kernel ran (kernels that overlap count once); kernels: by name, microseconds and calls.
    """
    kernels: dict[str, tuple[float, float]] = {}
    busy, last = 0.0, float("-inf")
    for name, begin, end in sorted(events, key=lambda event: event[1]):
        time_before, calls = kernels.get(name, (0.0, 0.0))
        kernels[name] = (time_before + (end - begin) / units, calls + 1 / units)
        busy += max(0.0, end - max(begin, last))
        last = max(last, end)
    return {"gpu": 1e-6 * busy / units, "kernels": kernels}


def graph_seconds(graph: Any) -> float:
    """What a CUDA graph takes on the GPU, from one replay to the next: nothing waits for the host."""
    import torch

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    begin.record()
    for _ in range(REPLAYS):
        graph.replay()
    end.record()
    end.synchronize()
    milliseconds: float = begin.elapsed_time(end)
    return 1e-3 * milliseconds / REPLAYS


class _StepRecorder:
    """Stands for the model runner's `execute_model` and counts the calls that hold one token of each request.

    Attributes:
        times: of the clock, at the start of each step that is timed.
        events: kernels of the PROFILED steps behind those, where `is_profiled`.
        graphs: CUDA graphs that the step behind all of these replayed.
        gpu: see `graph_seconds`, of this step; 0 without a GPU.
    """

    def __init__(self, execute: Any, batch: int, steps: int, is_profiled: bool) -> None:
        self._execute, self._batch, self._steps, self._is_profiled = execute, batch, steps, is_profiled
        self._count, self._profile = 0, None
        self.times: list[float] = []
        self.events: list[Event] = []
        self.graphs: list[Any] = []
        self.gpu = 0.0
        # Number of the step behind those that are timed and profiled.
        self._last = SKIPPED + steps + PROFILED * is_profiled + 1

    def __call__(self, scheduler_output: Any, *args: Any, **options: Any) -> Any:
        if scheduler_output.total_num_scheduled_tokens != self._batch:
            return self._execute(scheduler_output, *args, **options)
        self._count += 1
        self._before_step(self._count - SKIPPED - self._steps)
        if self._count != self._last:
            return self._execute(scheduler_output, *args, **options)
        with _noted_replays() as self.graphs:
            output = self._execute(scheduler_output, *args, **options)
        if len(self.graphs) == 1:
            # Now, while its buffers hold every request.
            self.gpu = graph_seconds(self.graphs[0])
        return output

    def _before_step(self, since_timed: int) -> None:
        if -self._steps < since_timed <= 0:
            self.times.append(time.perf_counter())
        elif self._is_profiled and since_timed == 1:
            self._profile = start_profile()
        elif self._is_profiled and since_timed == 1 + PROFILED:
            self.events = stop_profile(self._profile)

    def check(self) -> None:
        import torch

        has_gpu = torch.cuda.is_available()
        if self._count < self._last or (has_gpu and self._is_profiled and not self.events):
            raise RuntimeError(f"only {self._count} steps held {self._batch} requests; raise MARGIN")
        if (has_gpu or self.graphs) and len(self.graphs) != 1:
            raise RuntimeError(f"a step is one CUDA graph by default, but it replayed {len(self.graphs)}")


@contextmanager
def _noted_replays() -> Iterator[list[Any]]:
    """Lists the CUDA graphs that are replayed meanwhile."""
    import torch

    graphs: list[Any] = []
    replay = torch.cuda.CUDAGraph.replay

    def noted(graph: Any) -> None:
        graphs.append(graph)
        replay(graph)

    torch.cuda.CUDAGraph.replay = noted
    try:
        yield graphs
    finally:
        torch.cuda.CUDAGraph.replay = replay


def start_recording(worker: Any, batch: int, steps: int, is_profiled: bool) -> None:
    """Record the next steps that decode `batch` requests; to profile some behind them takes seconds."""
    worker.model_runner.execute_model = _StepRecorder(worker.model_runner.execute_model, batch, steps, is_profiled)


def stop_recording(worker: Any) -> dict[str, Any]:
    """What was recorded, of one step.

    Returns:
        clock: median seconds from one step to the next; gpu: see `graph_seconds`, 0 without a GPU; kernels: see
            `kernel_times`, none where they were not profiled. Sampling is not in the graph.
    """
    recorder = _end_recording(worker)
    intervals = [end - begin for begin, end in zip(recorder.times, recorder.times[1:], strict=False)]
    return {"clock": statistics.median(intervals), **kernel_times(recorder.events, PROFILED), "gpu": recorder.gpu}


def stop_timeline(worker: Any) -> list[Event]:
    """Every kernel of the PROFILED steps that were recorded."""
    return _end_recording(worker).events


def _end_recording(worker: Any) -> _StepRecorder:
    recorder: _StepRecorder = worker.model_runner.execute_model
    del worker.model_runner.execute_model
    recorder.check()
    return recorder


class _PromptRecorder:
    """Stands for the model runner's `execute_model` while the profiler runs, and counts steps and their tokens."""

    def __init__(self, execute: Any) -> None:
        self._execute = execute
        self.steps = self.tokens = 0
        self.profile = start_profile()

    def __call__(self, scheduler_output: Any, *args: Any, **options: Any) -> Any:
        tokens = scheduler_output.total_num_scheduled_tokens
        self.steps += tokens > 0
        self.tokens += tokens
        return self._execute(scheduler_output, *args, **options)


def start_prompts(worker: Any) -> None:
    """Profile from now on, while nothing runs; prompts of which one token each is generated come next."""
    worker.model_runner.execute_model = _PromptRecorder(worker.model_runner.execute_model)


def stop_prompts(worker: Any, tokens: int) -> dict[str, Any]:
    """What was profiled of these prompts, all steps together.

    Args:
        worker: that ran them; they have ended.
        tokens: of all prompts.

    Returns:
        steps: how many there were; gpu, kernels: see `kernel_times`.

    Raises:
        RuntimeError: the steps held other tokens than those of the prompts, or the profiler saw no kernel of a GPU.
    """
    import torch

    recorder = worker.model_runner.execute_model
    del worker.model_runner.execute_model
    events = stop_profile(recorder.profile)
    if recorder.tokens != tokens:
        raise RuntimeError(f"{recorder.steps} steps held {recorder.tokens} tokens; the prompts have {tokens}")
    if torch.cuda.is_available() and not events:
        raise RuntimeError(f"the profiler saw no kernel in {recorder.steps} steps")
    return {"steps": recorder.steps, **kernel_times(events, 1)}
