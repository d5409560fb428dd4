"""Which of several trained models is worth being a reference model? Needles, pass keys and text, beside each other.

    python benchmarks/candidates.py out/first out/second --train-length 512 --text FOLDER --output out/candidates.json

For each model: plain, the paper's table, tables of the default method with some budgets, and one with half of L
unfiltered and a quarter of the budget, all calibrated here on the package's sample. Models of bytes, of the families of
the torch reference; they need no table. Choose on other text than the one that the chosen model is shown on.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from support.trial import Trial
from support.variants import Subject

from vllm_longmamba.calibration.settings import CalibrationSettings
from vllm_longmamba.tables import PAPER
from vllm_longmamba.torch_reference import LongMamba, Plain, ReadingMethod
from vllm_longmamba.torch_reference.checkpoint import read_config

BUDGET_BEFORE_THE_END = 0.25


def methods(subject: Subject, lengths: list[int], budgets: list[float]) -> Iterator[tuple[str, ReadingMethod]]:
    """Names and methods, calibrated."""
    train_length = subject.metadata.train_length
    rows = sorted({train_length, *(length for length in lengths if length > train_length)})
    paper = CalibrationSettings(method=PAPER)
    [architecture] = read_config(subject.folder)["architectures"]
    yield "plain", Plain()
    clamped = subject.calibrated([], rows, paper.clamp(architecture))
    yield "paper", LongMamba.from_table(clamped, paper.theta)
    for budget in budgets:
        yield f"budget {budget:g}", LongMamba.from_table(subject.calibrated([], rows, 0.0, budget=budget))
    smaller = subject.calibrated([], rows, 0.0, budget=BUDGET_BEFORE_THE_END)
    yield "unfiltered end", LongMamba.from_table(smaller, unfiltered_end=train_length // 2)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--train-length", type=int, required=True, help="L of all models, in tokens")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="to hide numbers in and to score")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 8192, 16384, 32768])
    parser.add_argument("--budgets", type=float, nargs="+", default=[1.0, 2.0], help="1 is the default table's")
    parser.add_argument("--questions", type=int, default=27, help="of each kind and length, by nines [%(default)s]")
    parser.add_argument("--windows", type=int, default=4, help="of each length in each text [%(default)s]")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--segment-tokens", type=int)
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    options = parser.parse_args()
    results = []
    for folder in options.models:
        longest, started = max(options.lengths), time.monotonic()
        subject = Subject(folder, None, 2 * longest, options.device, options.segment_tokens, options.train_length)
        trial = Trial(subject, options.text, options.lengths, options.questions, options.windows)
        for name, method in methods(subject, options.lengths, options.budgets):
            for length in options.lengths:
                needles, passkey = (trial.answers(method, task, length) for task in ("needles", "passkey"))
                row = {"model": folder.name, "method": name, "length": length, "needles": needles.found}
                results.append(row | {"passkey": passkey.found, "text": trial.loss(method, length)})
                options.output.write_text(json.dumps(results, indent=1) + "\n")
            of_method = results[-len(options.lengths) :]
            figures = [_line(of_method, key, digits) for key, digits in (("needles", 2), ("passkey", 2), ("text", 3))]
            seconds = time.monotonic() - started
            print(f"{folder.name:12} {name:15}", *figures, f"[{seconds:.0f} s]", sep="  ", flush=True)


def _line(rows: list[dict[str, Any]], key: str, digits: int) -> str:
    return f"{key} {' '.join(format(row[key], f'.{digits}f') for row in rows)}"


if __name__ == "__main__":
    main()
