"""Functions for a worker of vLLM: decode steps by the clock, and their kernels by the profiler."""

import statistics
import time
from typing import Any

# Steps in front of those that are timed, and those behind them that are profiled.
SKIPPED = 8
PROFILED = 12
# Steps that may hold fewer requests, because some began or ended earlier.
MARGIN = 64


class _StepRecorder:
    """Stands for the model runner's `execute_model` and counts the calls that hold one token of each request."""

    def __init__(self, execute: Any, batch: int, steps: int) -> None:
        self._execute, self._batch, self._steps = execute, batch, steps
        self._count, self._profile = 0, None
        self.times: list[float] = []
        self.events: list[tuple[str, float, float]] = []

    def __call__(self, scheduler_output: Any, *args: Any, **options: Any) -> Any:
        if scheduler_output.total_num_scheduled_tokens == self._batch:
            self._count += 1
            self._before_step(self._count - SKIPPED - self._steps)
        return self._execute(scheduler_output, *args, **options)

    def _before_step(self, since_timed: int) -> None:
        import torch

        if -self._steps < since_timed <= 0:
            self.times.append(time.perf_counter())
        elif not torch.cuda.is_available():
            return
        elif since_timed == 1:
            torch.cuda.synchronize()
            self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            self._profile.start()
        elif since_timed == 1 + PROFILED and self._profile is not None:
            torch.cuda.synchronize()
            self._profile.stop()
            self.events = [
                (event.name, event.time_range.start, event.time_range.end)
                for event in self._profile.events()
                if event.device_type == torch.autograd.DeviceType.CUDA
            ]
            self._profile = None

    def check(self) -> None:
        import torch

        if len(self.times) < self._steps or (torch.cuda.is_available() and not self.events):
            raise RuntimeError(f"only {self._count} steps held {self._batch} requests; raise MARGIN")


def start_recording(worker: Any, batch: int, steps: int) -> None:
    """Record the next steps that decode `batch` requests."""
    worker.model_runner.execute_model = _StepRecorder(worker.model_runner.execute_model, batch, steps)


def stop_recording(worker: Any) -> dict[str, Any]:
    """What was recorded, of one step.

    Returns:
        clock: median seconds from one step to the next; gpu: seconds in which a kernel ran (kernels that overlap count
        once); kernels: by name, microseconds and calls.
    """
    recorder = worker.model_runner.execute_model
    del worker.model_runner.execute_model
    recorder.check()
    intervals = [end - begin for begin, end in zip(recorder.times, recorder.times[1:], strict=False)]
    kernels: dict[str, tuple[float, float]] = {}
    busy, last = 0.0, 0.0
    for name, begin, end in sorted(recorder.events, key=lambda event: event[1]):
        time_before, calls = kernels.get(name, (0.0, 0.0))
        kernels[name] = (time_before + (end - begin) / PROFILED, calls + 1 / PROFILED)
        busy += max(0.0, end - max(begin, last))
        last = max(last, end)
    return {"clock": statistics.median(intervals), "gpu": 1e-6 * busy / PROFILED, "kernels": kernels}
