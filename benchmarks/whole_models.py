"""Time whole models with dummy weights and published shapes: stock vLLM against --model-impl longmamba, in one run.

    python benchmarks/whole_models.py [--models NAME ...] [--only prefill|decode] [--batches N ...] [--out FOLDER]

Both engines have vLLM's defaults, that of the state's type included. For each model both are started, each in a process
of its own, then they take turns while the other waits.
Prefill: the time to the first token of one prompt, or of a batch. Decode: from one step to the next. Both by the clock,
and what the GPU takes: for a prompt the time in which kernels run, by the profiler; for a decode step its CUDA graph,
replayed one time after the other. Tables of the kernels are the profiler's. Writes whole_models.json as it
goes, and at the end whole_models.md (and a plot where matplotlib is installed); `support/report.py` makes these from
the JSON alone.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from support import engine_process
from support.engine_process import EngineProcess
from support.environment import environment
from support.report import KERNEL_LENGTHS, decode_lines, write_report
from support.shapes import MODELS, write_model

LENGTHS = [4096, 8192, 16384, 32768, 65536, 98304]
BATCH = (32, 8192)
BATCHES = [1, 64, 256, 512]
# the filter is switched off at these lengths as well; more repeats where a run is short
OFF_LENGTHS = [8192, 32768, 65536]
SHORT = 16384
# of the prompts in front of those that are timed: longer than vLLM reads in one step
WARM_LENGTH = 24576
MODES = ("stock", "on", "off")
# While it starts, vLLM tries sizes of its SSD kernels.
TUNED_AT_START = ("mamba2-1.3b", "zamba2-1.2b")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--only", choices=["prefill", "decode"], help="leave the other out")
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, help="tokens of a prompt")
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES, help="requests that are decoded together")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each kind; 4 more up to 16k tokens")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to try the script out without a GPU")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    parser.add_argument("--name", default="whole_models", help="of the files written to --out")
    given = parser.parse_args()
    if given.tiny:
        given.lengths = [48, 100]
    return given


class Pair:
    """The two engines of one model.

    Attributes:
        start_seconds: what the start of both took.
    """

    def __init__(self, name: str, folder: Path, given: argparse.Namespace) -> None:
        self.name = name
        options = {"tiny": given.tiny, "batches": given.batches}
        path = write_model(name, folder / name, given.tiny)
        self.engines: dict[bool, EngineProcess] = {}
        self.start_seconds: list[float] = []
        self._start = lambda is_ours: EngineProcess(name, path, is_ours, options)

    def start(self, at_once: bool) -> None:
        """Start both; one after the other if one is measured meanwhile."""
        for is_ours in (False, True):
            self.engines[is_ours] = self._start(is_ours)
            if not at_once:
                self.start_seconds.append(round(self.engines[is_ours].wait(), 1))
        if at_once:
            self.start_seconds = [round(engine.wait(), 1) for engine in self.engines.values()]

    def run(self, mode: str, method: str, *args: Any) -> Any:
        """Call a method of the engine that has this mode."""
        engine = self.engines[mode != "stock"]
        if mode != "stock":
            engine("on_worker", engine_process.set_filter, mode == "on")
        return engine(method, *args)

    def close(self) -> None:
        for engine in self.engines.values():
            engine.close()


def take_turns(pair: Pair, repeats: int, modes: tuple[str, ...], method: str, *args: Any) -> dict[str, Any]:
    """All times and their median, of each mode, in seconds."""
    times: dict[str, list[float]] = {mode: [] for mode in modes}
    for _ in range(repeats):
        for mode in modes:
            times[mode].append(pair.run(mode, method, *args))
    return {mode: {"median": statistics.median(values), "all": values} for mode, values in times.items()}


def measure_prefill(pair: Pair, given: argparse.Namespace, result: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Time prompts, then profile them; yields after each figure, so that it can be saved."""
    for mode in MODES:
        # twice: the first run compiles and tunes
        for _ in range(2):
            pair.run(mode, "generate", 1, 200 if given.tiny else WARM_LENGTH, 2)
    result["prefill"] = {}
    for length in given.lengths:
        modes = MODES if given.tiny or length in OFF_LENGTHS else MODES[:2]
        repeats = given.repeats + 4 if length <= SHORT else given.repeats
        result["prefill"][str(length)] = take_turns(pair, repeats, modes, "generate", 1, length, 1)
        yield f"prefill {length}", result["prefill"][str(length)]
    if not given.tiny:
        yield from measure_batch(pair, result)
    yield from profile_prefill(pair, result)


def measure_batch(pair: Pair, result: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Time a batch, and take the memory of a long prompt; yields after each figure."""
    result["batch"] = take_turns(pair, 3, MODES[:2], "generate", *BATCH, 1)
    yield f"prefill {BATCH[0]} x {BATCH[1]}", result["batch"]
    result["peak_gib"] = {}
    for mode in ("stock", "on"):
        engine = pair.engines[mode != "stock"]
        engine("on_worker", engine_process.peak_memory, True)
        engine("generate", 1, 65536, 1)
        result["peak_gib"][mode] = engine("on_worker", engine_process.peak_memory, False)
    yield "peak GiB", result["peak_gib"]


def profile_prefill(pair: Pair, result: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Add steps, GPU seconds and at some lengths kernels, of one run of each mode; yields each figure that has them."""
    prompts = [(f"prefill {length}", figure, 1, int(length)) for length, figure in result["prefill"].items()]
    if "batch" in result:
        prompts.append((f"prefill {BATCH[0]} x {BATCH[1]}", result["batch"], *BATCH))
    for what, figure, count, length in prompts:
        profiled = {mode: pair.run(mode, "profile_prompts", count, length) for mode in figure}
        if not profiled["on"]["gpu"]:
            # there is no GPU
            continue
        for mode, recorded in profiled.items():
            if count > 1 or length not in KERNEL_LENGTHS:
                del recorded["kernels"]
            figure[mode] |= recorded
        yield what, figure


def measure_decode(pair: Pair, given: argparse.Namespace, result: dict[str, Any]) -> Iterator[str]:
    """Time decode steps; yields lines of a report after each batch."""
    result["decode"] = {}
    for batch in given.batches:
        steps = 8 if given.tiny else {1: 192, 64: 96}.get(batch, 48)
        runs: dict[str, list[dict[str, Any]]] = {"stock": [], "on": []}
        for repeat in range(given.repeats + 1):
            for mode, recorded in runs.items():
                one = pair.run(mode, "decode", batch, steps, repeat == given.repeats)
                # the first run compiles
                if repeat:
                    recorded.append(one)
        result["decode"][str(batch)] = {mode: middle(recorded) for mode, recorded in runs.items()}
        yield "\n".join(decode_lines({str(batch): result["decode"][str(batch)]}))


def middle(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The medians, the clocks of all, and the kernels of the last run, which was profiled."""
    clocks = [run["clock"] for run in runs]
    gpu = statistics.median(run["gpu"] for run in runs)
    return runs[-1] | {"gpu": gpu, "clock": statistics.median(clocks), "clocks": clocks}


def describe(figure: dict[str, Any]) -> str:
    if not isinstance(figure["stock"], dict):
        return str(figure)
    return ", ".join(f"{mode} {_describe_mode(value, figure['stock'])}" for mode, value in figure.items())


def _describe_mode(value: dict[str, Any], stock: dict[str, Any]) -> str:
    parts = []
    for key, name in (("median", ""), ("gpu", "GPU ")):
        if key in value and key in stock:
            times = "" if value is stock else f" ({stock[key] / value[key]:.3f} x)"
            parts.append(f"{name}{1e3 * value[key]:.2f} ms{times}")
    return " ".join(parts)


def main() -> None:
    given = arguments()
    given.out.mkdir(parents=True, exist_ok=True)
    file = given.out / f"{given.name}.json"
    document: dict[str, Any] = {"environment": environment(), "settings": {"tiny": given.tiny}, "models": {}}
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in given.models:
            pair = Pair(name, Path(folder), given)
            try:
                pair.start(at_once=given.only == "decode" or name not in TUNED_AT_START)
                print(f"{name}: engines started in {pair.start_seconds} s", flush=True)
                result = document["models"].setdefault(name, {})
                result["filter"] = pair.engines[True]("on_worker", engine_process.filtered_share)
                if given.only != "decode":
                    for what, figure in measure_prefill(pair, given, result):
                        print(f"{name:16} {what:18} {describe(figure)}", flush=True)
                        file.write_text(json.dumps(document, indent=1) + "\n")
                if given.only != "prefill":
                    for lines in measure_decode(pair, given, result):
                        print(f"{name}\n{lines}", flush=True)
                        file.write_text(json.dumps(document, indent=1) + "\n")
            except (RuntimeError, TimeoutError, EOFError) as error:
                failures.append(f"{name}: {error!r}")
                print(failures[-1], flush=True)
            finally:
                pair.close()
    if file.exists():
        write_report(file)
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
