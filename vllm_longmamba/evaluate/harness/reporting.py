"""From scores to a report: the numbers with their intervals, as values and Markdown."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_longmamba.evaluate.markdown import document, interval, table
from vllm_longmamba.evaluate.methods import LABELS
from vllm_longmamba.evaluate.pictures import Pictures, draw_shares
from vllm_longmamba.evaluate.report import share_of
from vllm_longmamba.evaluate.statistics import average_interval

if TYPE_CHECKING:
    from vllm_longmamba.evaluate.harness.lm import Scored

# LongBench-E's own ranges, in words of the context.
_RANGES = (("0-4k", 0, 4000), ("4-8k", 4000, 8000), ("8k+", 8000, 10**9))


def summarize_harness(results: Mapping[str, Iterable["Scored"]]) -> dict[str, Any]:
    """Mean scores, by task and over all tasks.

    Args:
        results: method -> cells and what became of their prompts.

    Returns:
        "by_task", rows of method, length, task, questions, share, low, high (95 %); "average", rows of method, length,
        tasks, share, low, high, every task weighing the same; for LongBench-E "by_words", the same by words of the
        context.
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
    lines = [
        [task, str(own[methods[0], task]["questions"]), *(_percent(own[method, task]) for method in methods)]
        for task in dict.fromkeys(task for _, task in own)
    ]
    averages = {row["method"]: row for row in report["average"] if row["length"] == length}
    lines.append(["average", "", *(_percent(averages[method]) for method in methods)])
    return table(["task", "prompts", *(LABELS[method] for method in methods)], lines)


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
