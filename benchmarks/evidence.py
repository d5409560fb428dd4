"""The records of a model for docs/results.md: pass keys, needles and text through the engine, with several tables.

    longmamba calibrate examples/reference-mamba1-4m --train-length 512 --method paper --output out/paper.safetensors
    python benchmarks/evidence.py examples/reference-mamba1-4m --text BOOKS --gpus 0 1 --together 3 \
        --table paper=out/paper.safetensors --table unclamped=examples/reference-mamba1-4m/longmamba.safetensors

Runs `longmamba eval` of each task and table in processes of their own, --together of them on each GPU, and joins the
reports of a task (join_reports.py) in --output/MODEL/TASK. A run that ended before is not repeated; --work keeps the
reports and logs. Without --gpus, on the CPU. results_page.py then fills the page.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

ROOT = Path(__file__).resolve().parent.parent
TASKS = ("passkey", "needles", "perplexity")
QUESTIONS = ["--depths", "9", "--seeds", "0,1,2,3,4,5"]
WINDOWS = ["--windows", "10"]
# Several engines share a GPU: none measures its memory.
SHARED = {"enforce_eager": True, "kv_cache_memory_bytes": 2**32, "gpu_memory_utilization": 0.05}


@dataclass(frozen=True)
class Run:
    """One `longmamba eval`.

    Attributes:
        name: of its folder, task and table.
        command: with its arguments.
    """

    name: str
    command: list[str]


def tables(options: argparse.Namespace) -> list[tuple[str, str]]:
    """Names and files of the tables."""
    return [(name, file) for name, _, file in (given.partition("=") for given in options.table)]


def label(task: str, name: str) -> str:
    """The folder of a task and a table."""
    return f"{task}-{name.replace(' ', '-')}"


def runs(options: argparse.Namespace) -> Iterator[Run]:
    """The runs of all tasks and tables."""
    common = ["--lengths", ",".join(map(str, options.lengths)), "--dtype", "float32"]
    engine = ["--engine-args", json.dumps(SHARED)] if options.gpus else []
    for task in TASKS:
        text, asked = ("--text", WINDOWS) if task == "perplexity" else ("--haystack", QUESTIONS)
        for name, file in tables(options):
            folder = label(task, name)
            places = [text, str(options.text), "--table", file, "-o", str(options.work / folder)]
            yield Run(folder, ["longmamba", "eval", task, str(options.model), *asked, *common, *places, *engine])


def run(one: Run, work: Path, slots: "Queue[int | None]") -> bool:
    """Run it where a slot, the number of a GPU or None, is free; whether it succeeded, now or before."""
    folder, log = work / one.name, work / one.name / "log.txt"
    folder.mkdir(parents=True, exist_ok=True)
    done = folder / "done"
    if done.exists():
        return True
    slot = slots.get()
    environment = os.environ | ({} if slot is None else {"CUDA_VISIBLE_DEVICES": str(slot)})
    with log.open("wb") as output:
        code = subprocess.run(one.command, stdout=output, stderr=output, env=environment, check=False).returncode
    slots.put(slot)
    if code == 0:
        done.touch()
    print(f"{one.name}: {'done' if code == 0 else f'failed, see {log}'}", flush=True)
    return code == 0


def main() -> None:
    """Run what is left to run, and join the reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="to hide numbers in and to score")
    parser.add_argument("--table", action="append", required=True, metavar="NAME=FILE", help="repeatable")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512 * 2**power for power in range(7)])
    parser.add_argument("--gpus", type=int, nargs="*", default=[], help="numbers of the GPUs")
    parser.add_argument("--together", type=int, default=1, help="runs on a GPU, or on the CPU, at a time [%(default)s]")
    parser.add_argument("--work", type=Path, help="[default: out/evidence/MODEL]")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", help="[%(default)s]")
    options = parser.parse_args()
    options.work = options.work or ROOT / "out" / "evidence" / options.model.name
    all_runs = list(runs(options))
    slots: Queue[int | None] = Queue()
    for _ in range(options.together):
        for gpu in options.gpus or [None]:
            slots.put(gpu)
    with ThreadPoolExecutor(slots.qsize()) as pool:
        succeeded = list(pool.map(lambda one: run(one, options.work, slots), all_runs))
    if not all(succeeded):
        sys.exit("evidence: some runs failed; the same command goes on with them")
    for task in TASKS:
        reports = [f"{options.work / label(task, name)}={name}" for name, _ in tables(options)]
        joined = options.output / options.model.name / task
        script = Path(__file__).with_name("join_reports.py")
        subprocess.run([sys.executable, str(script), *reports, "-o", str(joined)], check=True)
        print(f"wrote {joined / 'report.json'}")


if __name__ == "__main__":
    main()
