"""From scores to a report: the numbers with their intervals, the printed ones beside them, as values and Markdown."""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_longmamba.evaluate.harness.benchmarks import Benchmark
from vllm_longmamba.evaluate.markdown import document, interval, table
from vllm_longmamba.evaluate.methods import LABELS
from vllm_longmamba.evaluate.pictures import Pictures, draw_shares
from vllm_longmamba.evaluate.report import share_of
from vllm_longmamba.evaluate.statistics import average_interval

if TYPE_CHECKING:
    from vllm_longmamba.evaluate.harness.lm import Scored

# LongBench-E's own ranges, in words of the context.
_RANGES = (("0-4k", 0, 4000), ("4-8k", 4000, 8000), ("8k+", 8000, 10**9))


def printed_figures(benchmark: Benchmark, model: str) -> dict[str, Any] | None:
    """The figures that a paper prints for the model of that name, where the package has them.

    Args:
        benchmark: what the figures are of.
        model: as the user named it; "Zyphra/Zamba2-1.2B" and a folder Zamba2-1.2B are the paper's Zamba2-1.2B.

    Returns:
        "model", "source" and "rows" of method, length, "scores" by short name of the task and "average", in percent.
    """
    for entry in resources.files(__package__).joinpath("printed").iterdir():
        if entry.name == f"{benchmark.name}.{Path(model).name.lower()}.json":
            figures: dict[str, Any] = json.loads(entry.read_text(encoding="utf-8"))
            return figures
    return None


def summarize_harness(results: Mapping[str, Iterable["Scored"]], printed: Mapping[str, Any] | None) -> dict[str, Any]:
    """Mean scores, by task and over all tasks.

    Args:
        results: method -> cells and what became of their prompts.
        printed: figures of a paper, if there are any.

    Returns:
        "by_task", rows of method, length, task, questions, share, low, high (95 %); "average", rows of method, length,
        tasks, share, low, high, every task weighing the same; for LongBench-E "by_words", the same by words of the
        context; "printed" as given.
    """
    scores: dict[tuple[str, int | None], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    ranges: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for method, scored in results.items():
        for cell, result in scored:
            scores[method, cell.length][cell.task].append(result["score"])
            if "words" in result:
                words = next(name for name, low, high in _RANGES if low <= result["words"] < high)
                ranges[method, words][cell.task].append(result["score"])
    return {
        "by_task": [
            {"method": method, "length": length, "task": task, **share_of(own)}
            for (method, length), tasks in scores.items()
            for task, own in tasks.items()
        ],
        "average": [
            {"method": method, "length": length, **average_of(tasks)} for (method, length), tasks in scores.items()
        ],
        "by_words": [
            {"method": method, "words": words, **average_of(tasks)} for (method, words), tasks in ranges.items()
        ],
        "printed": printed,
    }


def average_of(tasks: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Mean of tasks' mean scores: tasks, share, low, high (95 %, bootstrap over the prompts of each task)."""
    low, high = average_interval(list(tasks.values()))
    return {
        "tasks": len(tasks),
        "share": float(np.mean([np.mean(own) for own in tasks.values()])),
        "low": low,
        "high": high,
    }


def harness_markdown(report: Mapping[str, Any], title: str, pictures: Iterable[str]) -> str:
    """The report of a run; arguments as of `questions_markdown`."""
    parts = ["Mean scores in percent with 95 % intervals: Wilson's over prompts; of averages, bootstrap."]
    if report["printed"]:
        parts.append(f"Printed: {report['printed']['model']}, {report['printed']['source']}.")
    for length in dict.fromkeys(row["length"] for row in report["average"]):
        parts += [f"## {length} tokens"] if length is not None else []
        parts.append(_by_task(report, length))
    if report["by_words"]:
        parts += ["## By words of the context", _by_words(report)]
    return document(report, title, parts, pictures)


def draw_harness(report: Mapping[str, Any], title: str) -> Pictures:
    """Averages over length; nothing where there are no lengths."""
    rows = report["average"]
    return draw_shares(report, rows, title, "average of the tasks") if rows[0]["length"] is not None else {}


def _by_task(report: Mapping[str, Any], length: int | None) -> str:
    methods = list(report["methods"])
    own = {(row["method"], row["task"]): row for row in report["by_task"] if row["length"] == length}
    rows = report["printed"]["rows"] if report["printed"] else []
    printed = {row["method"]: row for row in rows if row["length"] == length}
    tasks = list(dict.fromkeys(task for _, task in own))
    lines = []
    for task in tasks:
        cells = [task, str(own[methods[0], task]["questions"]), *(_percent(own[method, task]) for method in methods)]
        lines.append(cells + [_two_digits(row["scores"].get(task)) for row in printed.values()])
    averages = {row["method"]: row for row in report["average"] if row["length"] == length}
    cells = ["average", "", *(_percent(averages[method]) for method in methods)]
    # An average is comparable only over the same tasks.
    cells += [_two_digits(row["average"] if set(row["scores"]) == set(tasks) else None) for row in printed.values()]
    header = ["task", "prompts", *(LABELS[method] for method in methods)]
    return table(header + [f"printed: {LABELS[method]}" for method in printed], [*lines, cells])


def _by_words(report: Mapping[str, Any]) -> str:
    methods = list(report["methods"])
    own = {(row["method"], row["words"]): row for row in report["by_words"]}
    rows = [
        [words, str(own[methods[0], words]["tasks"]), *(_percent(own[method, words]) for method in methods)]
        for words, _, _ in _RANGES
        if (methods[0], words) in own
    ]
    return table(["words", "tasks", *(LABELS[method] for method in methods)], rows)


def _percent(row: Mapping[str, float]) -> str:
    return interval({name: 100 * row[name] for name in ("share", "low", "high")}, "share", ".1f")


def _two_digits(score: float | None) -> str:
    return "" if score is None else f"{score:.2f}"
