"""What the parts of LongMamba are worth: passkeys and text loss of a model under variants of it.

    python benchmarks/ablations.py [NAME ...] [--model FOLDER] [--text FILE_OR_FOLDER]

    theta    min_retention from 1e-40 to 1e-1 (Table 3 of arXiv 2504.16053)
    clamp    clamp_percent (C), a calibration each
    groups   ten calibrations on different sequences (Table 4)
    rows     the prompt length S exact, or rounded to rows that lie more or less closely
    decode   the second half of each prompt counts as generated text: not filtered, as in the papers, or filtered by the
             length of the prompt, or by that of all text so far
    end      the last tokens of prompts unfiltered, with smaller budgets for those before (--ends, --budgets)
    state    a state cache in float32 or bfloat16, in the engine

Without names, all of them. `state` runs in vLLM, the others in the torch reference in float32: Mamba-1, Mamba-2 and
FalconMamba. An interrupted run goes on where it stopped (--records). Writes
benchmarks/results/MODEL/ablation-NAME/report.json and report.md, from which results_page.py makes a page.
"""

import argparse
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from support.variants import Subject

    from vllm_longmamba.evaluate.methods import Contestant
    from vllm_longmamba.evaluate.perplexity import Window

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
THETAS = (1e-40, 1e-30, 1e-20, 1e-10, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
CLAMPS = (0, 1, 2, 5, 10, 20, 40)
GROUPS = 10

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


def main() -> None:
    """Run the ablations that were named."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(ABLATIONS))
    parser.add_argument("--model", type=Path, default=EXAMPLES / "passkey-mamba2-4m")
    parser.add_argument("--table", help="threshold table [default: searched, as in serving]")
    parser.add_argument(
        "--text", type=Path, nargs="+", default=[EXAMPLES / "texts" / "haystack.txt"],
        help="to hide keys in and to score; not the text of the calibration",
    )  # fmt: skip
    parser.add_argument("--calibration-text", type=Path, nargs="+", default=[], help="[default: the package's sample]")
    parser.add_argument("--lengths", default="2048,4096", help="tokens of the prompts [%(default)s]")
    parser.add_argument("--depths", type=int, default=4, help="places of the key [%(default)s]")
    parser.add_argument("--seeds", default="0", help="questions of each length and place [%(default)s]")
    parser.add_argument("--windows", type=int, default=4, help="of each length in each text [%(default)s]")
    parser.add_argument("--scored", type=int, default=100, help="tokens at the end of a window [%(default)s]")
    parser.add_argument("--thetas", default=",".join(map(str, THETAS)))
    parser.add_argument("--clamps", default=",".join(map(str, CLAMPS)))
    parser.add_argument("--groups", type=int, default=GROUPS)
    parser.add_argument("--ends", default="0,128,256,512", help="tokens [%(default)s]")
    parser.add_argument("--budgets", default="1,0.5,0.25,0.125")
    parser.add_argument("--needles", type=int, default=0, help="ask also for one of so many named numbers")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="of the torch reference [default: a GPU, if any]")
    parser.add_argument(
        "--segment-tokens", type=int,
        help="of all prompts that the torch reference reads at a time [default: 8192 on a GPU; a small model: 131072]",
    )  # fmt: skip
    parser.add_argument("--records", type=Path, default=ROOT / "out" / "ablations", help="[%(default)s]")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    if unknown := sorted(set(options.names) - set(ABLATIONS)):
        parser.error(f"unknown are {', '.join(unknown)}; known are {', '.join(ABLATIONS)}")
    lengths = [int(length) for length in options.lengths.split(",")]
    from support.variants import Subject

    subject = Subject(options.model, options.table, 2 * max(lengths), options.device, options.segment_tokens)
    for name in options.names or ABLATIONS:
        _run(name, subject, lengths, options)


def _run(name: str, subject: "Subject", lengths: list[int], options: argparse.Namespace) -> None:
    import json

    from support.ablation_report import ablation_markdown
    from support.started_once import started_once

    from vllm_longmamba.evaluate.command_line import progress_bars
    from vllm_longmamba.evaluate.comparison import Answers, Comparison, Losses
    from vllm_longmamba.evaluate.needles import (
        PASSKEY_NEEDLE,
        PASSKEY_QUESTION,
        middles,
        needle_questions,
        passkey_questions,
    )
    from vllm_longmamba.evaluate.perplexity import windows
    from vllm_longmamba.evaluate.records import Records
    from vllm_longmamba.evaluate.report import provenance, summarize_perplexity, summarize_questions
    from vllm_longmamba.evaluate.texts import read_books

    if name == "rows":
        lengths = _between_rows(lengths, subject)
    depths = middles(options.depths)
    if name == "decode":
        # The key stands in the half that counts as prompt.
        depths = [depth / 2 for depth in depths]
    seeds = [int(seed) for seed in options.seeds.split(",")]
    books = read_books(options.text)
    of_records: dict[str, Any] = {
        "scored_tokens": options.scored,
        "wording": [PASSKEY_NEEDLE, PASSKEY_QUESTION],
        "texts": {book.name: book.digest for book in books},
    }
    questions = {"passkey": list(passkey_questions(lengths, depths, seeds))}
    if options.needles:
        of_records["needles"] = options.needles
        questions["needles"] = list(needle_questions(lengths, depths, seeds, options.needles))

    def choose(tokens: Mapping[str, int]) -> Iterator["Window"]:
        return windows(tokens, lengths, options.windows, options.scored)

    answers: dict[str, Answers] = {task: {} for task in questions}
    losses: Losses = {}
    records = Records(options.records / options.model.name / name / "records.jsonl")
    try:
        with progress_bars() as progress:
            contestants = ABLATIONS[name](subject, lengths, options)
            for variant, contestant in contestants.items():
                with started_once(contestant) as one:
                    comparison = Comparison({variant: one}, of_records, records, progress)
                    for task in questions:
                        answers[task] |= comparison.ask(questions[task], books)
                    losses |= comparison.score(books, choose, options.scored)
    finally:
        records.close()
    asked = {"lengths": lengths, "depths": depths, "seeds": seeds, "windows": options.windows}
    report = {
        "task": "ablation",
        "ablation": name,
        **provenance(options.model.name, contestants, {**asked, **of_records}),
        **{task: summarize_questions(given)["by_length"] for task, given in answers.items()},
        "perplexity": summarize_perplexity(losses)["by_length"],
    }
    report["command"] = f"python benchmarks/{report['command']}"
    folder = options.output / options.model.name / f"ablation-{name}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "report.md").write_text(ablation_markdown(report))
    print((folder / "report.md").read_text())


Variants = Mapping[str, "Contestant"]


def _theta(subject: "Subject", lengths: list[int], options: argparse.Namespace) -> Variants:
    thetas = [float(theta) for theta in options.thetas.split(",")]
    return {"plain": subject.plain()} | {f"{theta:g}": subject.filtered(subject.table, theta) for theta in thetas}


def _clamp(subject: "Subject", lengths: list[int], options: argparse.Namespace) -> Variants:
    rows = _rows_for(subject, lengths)
    tables = {
        f"{clamp} %": subject.calibrated(options.calibration_text, rows, float(clamp))
        for clamp in options.clamps.split(",")
    }
    return {"plain": subject.plain()} | {name: subject.filtered(table) for name, table in tables.items()}


def _groups(subject: "Subject", lengths: list[int], options: argparse.Namespace) -> Variants:
    rows, clamp = _rows_for(subject, lengths), subject.table.metadata.clamp_percent
    tables = {
        f"group {seed}": subject.calibrated(options.calibration_text, rows, clamp, seed)
        for seed in range(options.groups)
    }
    return {"plain": subject.plain()} | {name: subject.filtered(table) for name, table in tables.items()}


def _rows(subject: "Subject", lengths: list[int], options: argparse.Namespace) -> Variants:
    train_length, clamp = subject.table.metadata.train_length, subject.table.metadata.clamp_percent
    longest = max(lengths)
    step = _row_step(subject)
    doubling = [
        train_length * 2**power for power in range(longest.bit_length()) if train_length * 2**power < 2 * longest
    ]
    rows = {
        "exact": [train_length, *(length for length in lengths if length > train_length)],
        f"every {step}": _rows_for(subject, lengths),
        f"every {4 * step}": [train_length, *range(train_length + 4 * step, longest + 4 * step, 4 * step)],
        "doubling": doubling,
    }
    tables = {name: subject.calibrated(options.calibration_text, row, clamp) for name, row in rows.items()}
    return {"plain": subject.plain()} | {name: subject.filtered(table) for name, table in tables.items()}


def _decode(subject: "Subject", lengths: list[int], options: argparse.Namespace) -> Variants:
    from support.variants import Generated, Variant

    from vllm_longmamba.torch_reference import LongMamba, Plain

    table = subject.table
    described = {"table": table.digest(), "min_retention": table.metadata.min_retention}
    kinds: list[Generated] = ["not filtered", "filtered", "growing"]
    return {"plain": Variant(subject, Plain(), {"filter": False}, "not filtered")} | {
        kind: Variant(subject, LongMamba.from_table(table), described, kind) for kind in kinds
    }


def _end(subject: "Subject", lengths: list[int], options: argparse.Namespace) -> Variants:
    rows = _rows_for(subject, lengths)
    variants: dict[str, Contestant] = {"plain": subject.plain()}
    for budget in map(float, options.budgets.split(",")):
        table = subject.calibrated(options.calibration_text, rows, 0.0, budget=budget)
        for end in map(int, options.ends.split(",")):
            variants[f"end {end}, budget {budget:g}"] = subject.filtered(table, unfiltered_end=end)
    return variants


def _state(subject: "Subject", lengths: list[int], options: argparse.Namespace) -> Variants:
    from vllm_longmamba.evaluate.engine import EngineContestant

    arguments = {
        "dtype": "float32",
        "max_model_len": max(lengths) + 16,
        "max_num_batched_tokens": 512,
        "enforce_eager": True,
        "gpu_memory_utilization": 0.3,
    }
    own = {"table": options.table} if options.table else {}
    kinds = {"plain": ({"filter": False}, "float32"), "plain, bf16 state": ({"filter": False}, "bfloat16")}
    kinds |= {"float32 state": (own, "float32"), "bf16 state": (own, "bfloat16")}
    contestants = {}
    for name, (given, dtype) in kinds.items():
        contestant = EngineContestant(str(options.model), given, {**arguments, "mamba_ssm_cache_dtype": dtype})
        contestant.description |= {"state": dtype, "max_num_batched_tokens": 512}
        contestants[name] = contestant
    return contestants


def _row_step(subject: "Subject") -> int:
    lengths = subject.table.row_lengths
    return int(lengths[-1] - lengths[-2])


def _rows_for(subject: "Subject", lengths: list[int]) -> list[int]:
    from vllm_longmamba.tables import default_row_lengths

    rows: list[int] = default_row_lengths(subject.table.metadata.train_length, max(lengths)).tolist()
    return rows


def _between_rows(lengths: list[int], subject: "Subject") -> list[int]:
    """Three quarters of each length and half a row: far from rows at powers of two, half way between others."""
    return [length * 3 // 4 + _row_step(subject) // 2 for length in lengths]


ABLATIONS: dict[str, Callable[["Subject", list[int], argparse.Namespace], Variants]] = {
    "theta": _theta,
    "clamp": _clamp,
    "groups": _groups,
    "rows": _rows,
    "decode": _decode,
    "end": _end,
    "state": _state,
}


if __name__ == "__main__":
    main()
