"""From scores to a report: the numbers with their intervals, the printed ones beside them, as values and Markdown."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from vllm_longmamba.evaluate.harness.printed import AVERAGE, PrintedFigures
from vllm_longmamba.evaluate.harness.running import Scored
from vllm_longmamba.evaluate.markdown import conditions, images, interval, table
from vllm_longmamba.evaluate.methods import LABELS
from vllm_longmamba.evaluate.report import share_of

_RESAMPLES = 2000
# LongBench-E's own ranges, in words of the context.
_RANGES = (("0-4k", 0, 4000), ("4-8k", 4000, 8000), ("8k+", 8000, 10**9))


def summarize_harness(results: Mapping[str, Iterable[Scored]], printed: PrintedFigures | None) -> dict[str, Any]:
    """Mean scores, by task and over all tasks.

    Args:
        results: method -> cells and what became of their prompts.
        printed: figures of a paper, if there are any.

    Returns:
        "by_task", rows of method, length, task, questions, share, low, high (95 %); "average", rows of method, length,
        tasks, share, low, high, every task weighing the same; for LongBench-E "by_words", the same by words of the
        context; "printed": source, model, rows of method, length and scores in percent, or None.
    """
    scores: dict[tuple[str, int | None], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    ranges: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for method, scored in results.items():
        for cell, result in scored:
            scores[method, cell.length][cell.task].append(result["score"])
            if "words" in result:
                ranges[method, _range(result["words"])][cell.task].append(result["score"])
    summary: dict[str, Any] = {
        "by_task": [
            {"method": method, "length": length, "task": task, **share_of(own)}
            for (method, length), tasks in scores.items()
            for task, own in tasks.items()
        ],
        "average": [
            {"method": method, "length": length, **average_of(tasks)} for (method, length), tasks in scores.items()
        ],
        "printed": None,
    }
    if ranges:
        summary["by_words"] = [
            {"method": method, "words": words, **average_of(tasks)} for (method, words), tasks in ranges.items()
        ]
    if printed is not None:
        rows = [{"method": method, "length": length, "scores": own} for (method, length), own in printed.scores.items()]
        summary["printed"] = {"model": printed.model, "source": printed.source, "rows": rows}
    return summary


def average_of(tasks: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Mean of tasks' mean scores: tasks, share, low, high (95 %, bootstrap over the prompts of each task)."""
    rng = np.random.default_rng(0)
    draws = np.zeros(_RESAMPLES)
    for own in tasks.values():
        values = np.asarray(own)
        draws += values[rng.integers(len(values), size=(_RESAMPLES, len(values)))].mean(1) / len(tasks)
    low, high = np.percentile(draws, [2.5, 97.5])
    share = float(np.mean([np.mean(own) for own in tasks.values()]))
    return {"tasks": len(tasks), "share": share, "low": float(low), "high": float(high)}


def harness_markdown(report: Mapping[str, Any], title: str, pictures: Sequence[str]) -> str:
    """The report of a run.

    Args:
        report: as written to JSON.
        title: of the document.
        pictures: file names of pictures beside it.
    """
    text = (
        "Scores in percent, as lm-eval counts them, with 95 % confidence intervals (Wilson; of averages: bootstrap "
        "over the prompts of each task, too narrow where a task's scores are all alike)."
    )
    parts = [f"# {title}", text]
    if report["printed"] is not None:
        parts.append(f"Printed: {report['printed']['model']}, {report['printed']['source']}.")
    lengths = list(dict.fromkeys(row["length"] for row in report["by_task"]))
    for length in lengths:
        if length is not None:
            parts.append(f"## {length} tokens")
        parts.append(_by_task(report, length))
    if "by_words" in report:
        parts += ["## By words of the context (average of tasks)", _by_words(report)]
    return "\n\n".join([*parts, *images(pictures), conditions(report)]) + "\n"


def _by_task(report: Mapping[str, Any], length: int | None) -> str:
    methods = list(report["methods"])
    own = {(row["method"], row["task"]): row for row in report["by_task"] if row["length"] == length}
    printed = {row["method"]: row["scores"] for row in _printed_rows(report) if row["length"] == length}
    tasks = list(dict.fromkeys(task for _, task in own))
    rows = []
    for task in tasks:
        some = own[methods[0], task]
        cells = [task, str(some["questions"]), *(_percent(own[method, task]) for method in methods)]
        rows.append(cells + [_two_digits(scores.get(task)) for scores in printed.values()])
    averages = {row["method"]: row for row in report["average"] if row["length"] == length}
    cells = [AVERAGE, "", *(_percent(averages[method]) for method in methods)]
    for scores in printed.values():
        # An average is comparable only over the same tasks.
        same = set(scores) - {AVERAGE} == set(tasks)
        cells.append(_two_digits(scores.get(AVERAGE) if same else None))
    header = ["task", "prompts", *(LABELS[method] for method in methods)]
    return table(header + [f"printed: {LABELS.get(method, method)}" for method in printed], [*rows, cells])


def _by_words(report: Mapping[str, Any]) -> str:
    methods = list(report["methods"])
    own = {(row["method"], row["words"]): row for row in report["by_words"]}
    rows = [
        [words, str(own[methods[0], words]["tasks"]), *(_percent(own[method, words]) for method in methods)]
        for words, _, _ in _RANGES
        if (methods[0], words) in own
    ]
    return table(["words", "tasks", *(LABELS[method] for method in methods)], rows)


def _printed_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    return report["printed"]["rows"] if report["printed"] is not None else []


def _percent(row: Mapping[str, float]) -> str:
    return interval({name: 100 * row[name] for name in ("share", "low", "high")}, "share", ".1f")


def _two_digits(score: float | None) -> str:
    return "" if score is None else f"{score:.2f}"


def _range(words: int) -> str:
    return next(name for name, low, high in _RANGES if low <= words < high)
