"""Pass keys, needles, RULER and text of several models with many methods, through the engine, in limited time.

    python benchmarks/evidence.py MODEL ... --text DOCUMENTS --search-text BOOKS --ruler RULER \
        --gpus 0 1 2 3 --together 3 --minutes 9 --output out/evidence

evidence.json says which methods, tasks, texts, lengths and how many questions, the most important first. Processes,
--together of them on each GPU, take one cell after the other from that list. Each holds the engine of one model, which
makes all its tables at its start. Where a method is the best of a search, its cells wait for those of the search, on
--search-text.

A finished cell is one line of --output/records/*.jsonl. With these files in place, the same command goes on where it
ended. evidence_ruler.py makes the prompts of --ruler, `results_page.py --add` the page. Without --gpus, on the CPU.
"""

import argparse
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from support.evidence_plan import SETTINGS, Plan, Records, Unit, for_train_length, read_settings
from support.evidence_texts import ruler_file

ROOT = Path(__file__).resolve().parent
# Processes end by themselves where a cell would take too long; after this they are ended.
GRACE_SECONDS = 10
FIRST_RATE = 200_000
MOST_FAILURES = 3
# Many engines that start at once share the cores.
FEW_THREADS = {"OMP_NUM_THREADS": "4", "TORCHINDUCTOR_COMPILE_THREADS": "4", "RAYON_NUM_THREADS": "8"}

# What an engine serves: a model's folder, and DeciMamba's settings or "".
Variant = tuple[str, str]


class Worker:
    """A process that runs units, in one engine after the other.

    Args:
        options: the command's.
        settings: contents of the settings file.
    """

    def __init__(self, options: argparse.Namespace, settings: dict[str, Any]) -> None:
        self._options, self._settings = options, settings
        self._output: Path = options.output
        self._models = {model.name: model for model in options.models}
        decimates = [name for name, model in self._models.items() if is_pure(model)]
        self._plan = Plan(settings, list(self._models), decimates)
        self._records = Records(options.output / "records")
        self._rate = float(FIRST_RATE)
        self._longest = max(length for work in settings["work"] for length in work.get("lengths", ()))

    def run(self) -> None:
        """Run what can be run until the time is over."""
        while variant := self._choose_engine():
            try:
                self._serve(variant)
            except Exception:
                traceback.print_exc()
                self._give_up(variant)

    def _serve(self, variant: Variant) -> None:
        from support.evidence_engine import ROOM, Engine, Tables, description_key, unit_record

        name, decimamba = variant
        longest = self._longest + ROOM
        tables = Tables(self._settings, self._output / "tables" / name, longest)
        texts = (self._options.text, self._options.search_text)
        engine = Engine(self._models[name], self._settings, tables, decimamba, texts, self._options.ruler, longest)
        self._record(
            {"key": description_key(name, decimamba), "model": name, "decimamba": decimamba, **engine.describe()}
        )
        failures = 0
        try:
            while unit := self._claim(variant):
                started = time.monotonic()
                try:
                    result = engine.measure(unit)
                except Exception:
                    # One cell may fail; where many do, the engine is dead.
                    failures += 1
                    if failures == MOST_FAILURES:
                        raise
                    traceback.print_exc()
                    continue
                seconds = time.monotonic() - started
                self._record(unit_record(unit, seconds, result))
                rate = self._tokens(unit) / max(seconds, 1e-3)
                self._rate = 0.7 * self._rate + 0.3 * rate
                print(f"{unit.name}: {seconds:.1f} s, {rate:.0f} tokens/s", flush=True)
        finally:
            engine.close()

    def _left(self) -> float:
        return float(self._options.deadline) - time.time()

    def _tokens(self, unit: Unit) -> int:
        return unit.tokens(self._settings["documents"])

    def _open(self, only: str | None = None) -> Iterator[tuple[int, Variant, Unit]]:
        """Units that nobody has taken, in their order, with tier and engine; of all models or of one."""
        claimed_keys = set(os.listdir(self._output / "claims"))
        for tier, unit in self._plan.units(self._records.all(), only):
            variant = (unit.model, unit.setting.decimamba)
            if unit.key in claimed_keys or self._given_up(variant):
                continue
            own_haystack = unit.task != "text" and not unit.text
            if own_haystack and not ruler_file(self._options.ruler, unit.task, unit.length).exists():
                continue
            yield tier, variant, unit

    def _claim(self, variant: Variant) -> Unit | None:
        with self._lock():
            for _, of, unit in self._open(variant[0]):
                if of == variant and self._tokens(unit) / self._rate < self._left():
                    (self._output / "claims" / unit.key).touch()
                    return unit
        return None

    def _choose_engine(self) -> Variant | None:
        """The engine to start: of those needed for the most important units, that with the most work for a process."""
        if self._left() < self._settings["start_seconds"]:
            return None
        with self._lock():
            mine = self._output / "engines" / str(self._options.worker)
            mine.unlink(missing_ok=True)
            running = Counter(file.read_text() for file in mine.parent.iterdir())
            first, work = None, Counter[Variant]()
            for tier, variant, unit in self._open():
                first = tier if first is None else first
                # Later tiers count for little.
                work[variant] += self._tokens(unit) / 4 ** (tier - first)
            if not work:
                return None
            chosen = max(work, key=lambda variant: work[variant] / (1 + running[json.dumps(variant)]))
            mine.write_text(json.dumps(chosen))
            return chosen

    def _given_up(self, variant: Variant) -> bool:
        return (self._output / "claims" / f"failed-{variant[0]}-{bool(variant[1])}").exists()

    def _give_up(self, variant: Variant) -> None:
        (self._output / "claims" / f"failed-{variant[0]}-{bool(variant[1])}").touch()

    def _record(self, record: dict[str, Any]) -> None:
        with (self._output / "records" / f"worker-{self._options.worker}.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")

    @contextmanager
    def _lock(self) -> Iterator[None]:
        with (self._output / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def is_pure(model: Path) -> bool:
    """Whether a model has nothing but Mamba layers, as DeciMamba asks."""
    config = json.loads((model / "config.json").read_text())
    return config.get("model_type", "mamba") in ("mamba", "mamba2", "falcon_mamba") and not config.get("attn_layer_idx")


def drive(options: argparse.Namespace) -> None:
    """Start the processes, wait for them, and end those that outlive the time."""
    for name in ("records", "tables", "claims", "engines", "logs"):
        (options.output / name).mkdir(parents=True, exist_ok=True)
    for name in ("claims", "engines"):
        for file in (options.output / name).iterdir():
            file.unlink()
    # A process appends to a file of its own.
    first = max((int(file.stem.partition("-")[2]) + 1 for file in _records(options)), default=0)
    places = [gpu for _ in range(options.together) for gpu in options.gpus or [None]]
    deadline = time.time() + 60 * options.minutes
    processes = []
    for number, gpu in enumerate(places, first):
        command = [sys.executable, *sys.argv, "--worker", str(number), "--deadline", str(deadline)]
        # vLLM's own processes import the worker extension by its name.
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        # Several engines that compile the same model at the same time each do it in a folder of their own.
        cache = str(options.output / "cache" / f"worker-{number}")
        environment = FEW_THREADS | os.environ | {"PYTHONPATH": paths, "VLLM_CACHE_ROOT": cache}
        if gpu is not None:
            environment |= {"CUDA_VISIBLE_DEVICES": str(gpu)}
        with (options.output / "logs" / f"worker-{number}.txt").open("wb") as log:
            processes.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True))
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(deadline + GRACE_SECONDS - time.time(), 0.1))
        _end(process)
    done = Records(options.output / "records").all()
    print(f"{len(done)} records in {options.output / 'records'}")


def _records(options: argparse.Namespace) -> list[Path]:
    return sorted((options.output / "records").glob("worker-*.jsonl"))


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and the engine that it may have left."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main() -> None:
    """Run what is left to run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL", help="folder of a model")
    parser.add_argument("--settings", type=Path, default=SETTINGS, help="[%(default)s]")
    parser.add_argument("--train-length", type=int, help="of the models; all lengths are scaled [the settings']")
    parser.add_argument("--text", type=Path, required=True, help="documents to measure on, .txt or .txt.xz")
    parser.add_argument("--search-text", type=Path, required=True, help="other documents, for searches")
    parser.add_argument("--ruler", type=Path, default=Path("out/ruler-prompts"), help="prompts [%(default)s]")
    parser.add_argument("--gpus", type=int, nargs="*", default=[], help="numbers of the GPUs")
    parser.add_argument("--together", type=int, default=1, help="engines on a GPU, or on the CPU [%(default)s]")
    parser.add_argument("--minutes", type=float, default=9.0, help="then stop [%(default)s]")
    parser.add_argument("--output", type=Path, default=Path("out/evidence"), help="[%(default)s]")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is None:
        drive(options)
    else:
        settings = read_settings(options.settings)
        Worker(options, for_train_length(settings, options.train_length or settings["train_length"])).run()


if __name__ == "__main__":
    main()
