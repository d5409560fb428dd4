"""Time whole models with dummy weights and published shapes: stock vLLM against --model-impl longmamba, in one run.

    python benchmarks/whole_models.py [--models NAME ...] [--quick] [--out FOLDER] [--profile]

For each model both engines are started, one after the other, then they take turns, each in a process of its own
while the other waits.
Prefill: the time to the first token of one prompt, or of a batch. Decode: the time of one step, from the difference
between runs of different length. Writes whole_models.json as it goes, and at the end whole_models.md (and a plot where
matplotlib is installed); `support/report.py` makes these from the JSON alone.
"""

import argparse
import fcntl
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from support import engine_process
from support.engine_process import EngineProcess
from support.environment import environment
from support.report import write_report
from support.shapes import MODELS, write_model

LENGTHS = [4096, 8192, 16384, 24576, 32768, 40960, 49152, 65536, 81920, 98304]
BATCH = (32, 8192)
DECODE_BATCHES = [1, 64, 256]
# the filter is switched off at these lengths as well; more repeats where a run is short
OFF_LENGTHS = [8192, 32768, 65536]
SHORT = 16384
MODES = ("stock", "on", "off")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--repeats", type=int, default=3, help="runs of each kind; 4 more up to 16k tokens")
    parser.add_argument("--budget", type=int, default=16384, help="max_num_batched_tokens; vLLM's default for LLM()")
    parser.add_argument("--state-dtype", default="auto", help="of the SSM state, in both engines; auto: the model's")
    parser.add_argument("--quick", action="store_true", help="three prompt lengths, no batch of prompts")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to try the script out without a GPU")
    parser.add_argument("--no-decode", action="store_true")
    parser.add_argument("--decode-batches", nargs="+", type=int, choices=DECODE_BATCHES, default=DECODE_BATCHES)
    parser.add_argument("--decode-repeats", type=int, default=7)
    parser.add_argument("--no-prefill", action="store_true")
    parser.add_argument("--profile", action="store_true", help="print the kernels of an 8k and of a decode run")
    parser.add_argument("--turn", type=Path, help="lock file: runs that name the same one measure one after the other")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    parser.add_argument("--name", default="whole_models", help="of the files written to --out")
    given = parser.parse_args()
    if given.quick:
        given.lengths = [8192, 32768, 65536]
    if given.tiny:
        given.lengths = [48, 100]
    return given


class Pair:
    """The two engines of one model, started one after the other: vLLM's autotuner times kernels while one starts.

    Attributes:
        start_seconds: what the start of both took.
    """

    def __init__(self, name: str, folder: Path, given: argparse.Namespace) -> None:
        self.name = name
        options = {"tiny": given.tiny, "budget": given.budget, "state_dtype": given.state_dtype}
        options["batches"] = DECODE_BATCHES
        path = write_model(name, folder / name, given.tiny)
        self.engines: dict[bool, EngineProcess] = {}
        self.start_seconds: list[float] = []
        self._start = lambda is_ours: EngineProcess(name, path, is_ours, options)

    def start(self) -> None:
        for is_ours in (False, True):
            self.engines[is_ours] = self._start(is_ours)
            self.start_seconds.append(round(self.engines[is_ours].wait(), 1))

    def run(self, mode: str, method: str, *args: Any) -> float:
        """Call a method of the engine that has this mode."""
        engine = self.engines[mode != "stock"]
        if mode != "stock":
            engine("on_worker", engine_process.set_filter, mode == "on")
        seconds: float = engine(method, *args)
        return seconds

    def close(self) -> None:
        for engine in self.engines.values():
            engine.close()


@contextmanager
def turn(file: Path | None, *, alone: bool) -> Iterator[None]:
    """Waits for the runs that share a GPU: several start their engines at once, one measures, and never both."""
    if file is None:
        yield
        return
    with file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield


def take_turns(pair: Pair, repeats: int, modes: tuple[str, ...], method: str, *args: Any) -> dict[str, Any]:
    """All times and their median, of each mode, in seconds."""
    times: dict[str, list[float]] = {mode: [] for mode in modes}
    for _ in range(repeats):
        for mode in modes:
            times[mode].append(pair.run(mode, method, *args))
    return {mode: {"median": statistics.median(values), "all": values} for mode, values in times.items()}


def measure(pair: Pair, given: argparse.Namespace, result: dict[str, Any]) -> Any:
    """Measure one model; yields after each figure, so that it can be saved."""
    ours = pair.engines[True]
    result["filter"] = ours("on_worker", engine_process.filtered_share)
    warm_length = 200 if given.tiny else given.budget + 8192
    for mode in MODES:
        # twice: the first run compiles and tunes
        for _ in range(2):
            pair.run(mode, "generate", 1, warm_length, 2)
    result["prefill"] = {}
    for length in [] if given.no_prefill else given.lengths:
        modes = MODES if given.tiny or length in OFF_LENGTHS else MODES[:2]
        repeats = given.repeats + 4 if length <= SHORT else given.repeats
        result["prefill"][str(length)] = take_turns(pair, repeats, modes, "generate", 1, length, 1)
        yield f"prefill {length}", result["prefill"][str(length)]
    if not (given.quick or given.tiny or given.no_prefill):
        result["batch"] = take_turns(pair, 3, MODES[:2], "generate", *BATCH, 1)
        yield f"prefill {BATCH[0]} x {BATCH[1]}", result["batch"]
    result["decode"] = {}
    for batch in [] if given.no_decode else given.decode_batches:
        steps = 8 if given.tiny else {1: 192, 64: 128}.get(batch, 64)
        pair.run("stock", "decode", batch, 8)
        pair.run("on", "decode", batch, 8)
        result["decode"][str(batch)] = take_turns(pair, given.decode_repeats, ("stock", "on"), "decode", batch, steps)
        yield f"decode {batch}", result["decode"][str(batch)]
    if not given.tiny:
        result["peak_gib"] = {}
        for mode in ("stock", "on"):
            engine = pair.engines[mode != "stock"]
            engine("on_worker", engine_process.peak_memory, True)
            engine("generate", 1, 65536, 1)
            result["peak_gib"][mode] = engine("on_worker", engine_process.peak_memory, False)
        yield "peak GiB", result["peak_gib"]


def profile(pair: Pair, batches: list[int]) -> None:
    """Print the kernels of an 8k prefill and of some decode steps, of both engines, and what a step takes of Python."""
    for mode in ("stock", "on"):
        engine = pair.engines[mode != "stock"]
        runs = {"prefill 8192": (1, 8192, 1)} | {f"decode {batch}": (batch, 16, 32) for batch in batches}
        for what, args in runs.items():
            engine("generate", *args)
            engine("on_worker", engine_process.start_profile)
            engine("generate", *args)
            print(f"== {pair.name} {mode} {what}")
            print(engine("on_worker", engine_process.stop_profile, 16), flush=True)
        engine("on_worker", engine_process.start_host_profile)
        engine("generate", 1, 16, 64)
        print(f"== {pair.name} {mode} decode 1, host")
        print(engine("on_worker", engine_process.stop_host_profile, 45), flush=True)


def describe(figure: dict[str, Any]) -> str:
    if not isinstance(figure["stock"], dict):
        return str(figure)
    stock = figure["stock"]["median"]
    return ", ".join(
        f"{mode} {1e3 * value['median']:.2f} ms" + (f" ({stock / value['median']:.3f} x)" if mode != "stock" else "")
        for mode, value in figure.items()
    )


def main() -> None:
    given = arguments()
    given.out.mkdir(parents=True, exist_ok=True)
    file = given.out / f"{given.name}.json"
    document: dict[str, Any] = {"environment": environment(), "models": {}}
    document["settings"] = {
        "max_num_batched_tokens": given.budget,
        "state_dtype": given.state_dtype,
        "tiny": given.tiny,
    }
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in given.models:
            pair = Pair(name, Path(folder), given)
            try:
                with turn(given.turn, alone=False):
                    pair.start()
                print(f"{name}: engines started in {pair.start_seconds} s", flush=True)
                result = document["models"].setdefault(name, {})
                with turn(given.turn, alone=True):
                    for what, figure in measure(pair, given, result):
                        print(f"{name:16} {what:18} {describe(figure)}", flush=True)
                        file.write_text(json.dumps(document, indent=1) + "\n")
                    if given.profile:
                        profile(pair, DECODE_BATCHES)
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
