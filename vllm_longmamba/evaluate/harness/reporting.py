"""From scores to a report: the numbers with their intervals, as values and Markdown."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_longmamba.evaluate.markdown import labels, share_lines, table
from vllm_longmamba.evaluate.pictures import Pictures, draw_shares
from vllm_longmamba.evaluate.report import rows, share_of
from vllm_longmamba.evaluate.statistics import average_interval

if TYPE_CHECKING:
    from vllm_longmamba.evaluate.harness.lm import Scored

# LongBench-E's own ranges, in words of the context.
_RANGES = (("0-4k", 4000), ("4-8k", 8000), ("8k+", 10**9))


def summarize_harness(results: Mapping[str, Iterable["Scored"]]) -> dict[str, Any]:
    """Mean scores, by task and over all tasks.

    Args:
        results: method -> cells and what became of their prompts.

    Returns:
        "by_task", rows of method, length, task, questions, share, low, high (95 %); "average", rows of method, length,
        tasks, share, low, high, every task weighing the same; for LongBench-E "by_words", the same by words of the
        context.
    """
    of_tasks, of_lengths, of_words = [], [], []
    for method, scored in results.items():
        for cell, result in scored:
            place, score = {"method": method, "length": cell.length}, result["score"]
            of_tasks.append(({**place, "task": cell.task}, score))
            of_lengths.append((place, (cell.task, score)))
            if "words" in result:
                words = next(name for name, end in _RANGES if result["words"] < end)
                of_words.append(({"method": method, "words": words}, (cell.task, score)))
    return {
        "by_task": rows(of_tasks, share_of),
        "average": rows(of_lengths, average_of),
        "by_words": sorted(rows(of_words, average_of), key=lambda row: str(row["words"])),
    }


def average_of(scores: Iterable[tuple[str, float]]) -> dict[str, Any]:
    """Mean of tasks' mean scores: tasks, share, low, high (95 %, bootstrap over the prompts of each task).

    Args:
        scores: task and score of each prompt.
    """
    tasks: dict[str, list[float]] = defaultdict(list)
    for task, score in scores:
        tasks[task].append(score)
    low, high = average_interval(list(tasks.values()))
    share = float(np.mean([np.mean(own) for own in tasks.values()]))
    return {"tasks": len(tasks), "share": share, "low": low, "high": high}


def harness_markdown(report: Mapping[str, Any]) -> list[str]:
    """The paragraphs and tables of a run."""
    parts = ["Mean scores with 95 % intervals: Wilson's over prompts; of averages, bootstrap."]
    for length in dict.fromkeys(row["length"] for row in report["average"]):
        by_task = [row for row in report["by_task"] if row["length"] == length]
        average = [{**row, "task": "average", "questions": ""} for row in report["average"] if row["length"] == length]
        lines = share_lines([*by_task, *average], "task", "questions", ".1%")
        parts += [f"## {length} tokens"] if length is not None else []
        parts.append(table(["task", "prompts", *labels(report)], lines))
    if report["by_words"]:
        lines = share_lines(report["by_words"], "words", "tasks", ".1%")
        parts += ["## By words of the context", table(["words", "tasks", *labels(report)], lines)]
    return parts


def draw_harness(report: Mapping[str, Any], title: str) -> Pictures:
    """Averages over length; nothing where there are no lengths."""
    averages = report["average"]
    return draw_shares(report, averages, title, "average of the tasks") if averages[0]["length"] is not None else {}
