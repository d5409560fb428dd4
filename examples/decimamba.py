"""Passkeys found by the plain model, LongMamba and DeciMamba in the torch reference, in float32.

    python examples/decimamba.py --search        finds settings of DeciMamba first (seed 0), then asks with seed 1
    python examples/decimamba.py --settings '{"layers": [3], "L_base": 512}'

Runs in a source checkout only, where the torch reference is. Writes what it found as JSON. For models with a byte-level
tokenizer.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from passkey import KEY_DIGITS, PasskeyTask, passkey_tasks, read_haystack
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "references"))
import torch_models as reference

MODEL = Path(__file__).parent / "passkey-mamba2-4m"
TEXT = Path(__file__).parent / "texts" / "calibration.txt"
TRAIN_LENGTH = 512
DEPTHS = [(number + 0.5) / 12 for number in range(12)]
# The search asks fewer questions, other ones than those that are reported.
SEARCH_LENGTHS, SEARCH_DEPTHS, SEARCH_SEED = (2048, 4096, 8192), [(number + 0.5) / 8 for number in range(8)], 0
L_BASES = (512, 1024, 2048, 4096)


def share_found(model: Any, tasks: list[PasskeyTask]) -> float:
    """How many of the keys a model finds."""
    answers = model.generate([list(task.prompt.encode()) for task in tasks], KEY_DIGITS)
    return sum(
        task.is_answered_by(bytes(min(token, 255) for token in answer).decode("latin-1"))
        for task, answer in zip(tasks, answers, strict=True)
    ) / len(tasks)


def search(model: Any, console: Console) -> list[dict[str, object]]:
    """Settings of DeciMamba and their scores, the best first."""
    tasks = passkey_tasks(read_haystack(), SEARCH_LENGTHS, SEARCH_DEPTHS, seed=SEARCH_SEED)
    distances = reference.mean_distances(model, list(TEXT.read_bytes()[: 4 * TRAIN_LENGTH]))
    with Progress(console=console) as progress:
        trials = reference.search_decimamba(
            lambda settings: share_found(model.with_method(settings), tasks), distances, L_BASES, progress=progress
        )
    return [{"settings": trial.settings.to_dict(), "found": trial.score} for trial in trials]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--search", action="store_true")
    chosen.add_argument("--settings", type=json.loads)
    parser.add_argument("--output", type=Path, default=Path("out/decimamba.json"))
    options = parser.parse_args()

    console = Console()
    started = time.perf_counter()
    model = reference.TorchModel(options.model)
    trials = search(model, console) if options.search else []
    settings = reference.DeciMamba(**(trials[0]["settings"] if trials else options.settings))
    methods = {"plain": model.method, "LongMamba": reference.LongMamba.for_folder(options.model), "DeciMamba": settings}
    found: dict[str, dict[int, float]] = {name: {} for name in methods}
    for length in options.lengths:
        tasks = passkey_tasks(read_haystack(), [length], DEPTHS, seed=options.seed)
        for name, method in methods.items():
            found[name][length] = share_found(model.with_method(method), tasks)
            console.print(f"{length:6d} {name:10s} {found[name][length]:.2f}")
    table = Table("prompt", *map(str, options.lengths), title=f"{settings}")
    for name, row in found.items():
        table.add_row(name, *(f"{share:.2f}" for share in row.values()))
    console.print(table)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "model": options.model.name,
        "seed": options.seed,
        "depths": len(DEPTHS),
        "device": str(model.device),
        "torch": torch.__version__,
        "seconds": time.perf_counter() - started,
        "found": found,
        "decimamba": settings.to_dict(),
        "trials": trials,
    }
    options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
