"""Pictures of a report, as PNG and SVG: RULER's average over length, LongBench-E's tasks as bars."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_longmamba.evaluate.harness.printed import AVERAGE
from vllm_longmamba.evaluate.methods import LABELS
from vllm_longmamba.evaluate.pictures import COLOURS, figure_with_panels, save


def draw_harness(report: Mapping[str, Any], folder: Path, title: str) -> list[str]:
    """Draw averages over length, or tasks side by side where there are no lengths.

    Args:
        report: as written to JSON.
        folder: takes the pictures.
        title: of the picture.

    Returns:
        The name of the PNG file.
    """
    draw = _draw_lengths if report["average"][0]["length"] is not None else _draw_tasks
    return [draw(report, folder, title)]


def _draw_lengths(report: Mapping[str, Any], folder: Path, title: str) -> str:
    lengths = sorted({row["length"] for row in report["average"]})
    tasks = {row["task"] for row in report["by_task"]}
    with figure_with_panels(7.5, 4.0) as (figure, [axes]):
        for number, method in enumerate(report["methods"]):
            own = sorted((row["length"], row) for row in report["average"] if row["method"] == method)
            low, middle, high = ([100 * row[name] for _, row in own] for name in ("low", "share", "high"))
            colour = COLOURS[number % len(COLOURS)]
            axes.plot([length for length, _ in own], middle, color=colour, marker="o", label=LABELS[method])
            axes.fill_between([length for length, _ in own], low, high, color=colour, alpha=0.15, linewidth=0)
            printed = sorted(_printed_averages(report, method, tasks))
            if printed:
                label = f"{LABELS[method]}, printed"
                axes.plot(*zip(*printed, strict=True), color=colour, linestyle=":", marker="x", label=label)
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.set_ylim(-3, 103)
        axes.set_xlabel("prompt and answer (tokens)")
        axes.set_ylabel(f"average of {len(tasks)} tasks (%)")
        _finish(axes, title, "y")
        return save(figure, folder, "by-length")


def _printed_averages(report: Mapping[str, Any], method: str, tasks: set[str]) -> list[tuple[int, float]]:
    lengths = {row["length"] for row in report["average"]}
    rows = report["printed"]["rows"] if report["printed"] is not None else []
    return [
        (row["length"], row["scores"][AVERAGE])
        for row in rows
        if row["method"] == method and row["length"] in lengths and set(row["scores"]) == tasks | {AVERAGE}
    ]


def _draw_tasks(report: Mapping[str, Any], folder: Path, title: str) -> str:
    methods = list(report["methods"])
    tasks = list(dict.fromkeys(row["task"] for row in report["by_task"]))
    printed = {row["method"]: row["scores"] for row in report["printed"]["rows"]} if report["printed"] else {}
    thickness = 0.8 / len(methods)
    with figure_with_panels(7.5, 1.2 + 0.4 * len(tasks)) as (figure, [axes]):
        for number, method in enumerate(methods):
            own = {row["task"]: row for row in report["by_task"] if row["method"] == method}
            places = [place + (number - (len(methods) - 1) / 2) * thickness for place in range(len(tasks))]
            middle = [100 * own[task]["share"] for task in tasks]
            errors = [
                [100 * (own[task]["share"] - own[task]["low"]) for task in tasks],
                [100 * (own[task]["high"] - own[task]["share"]) for task in tasks],
            ]
            style = {"color": COLOURS[number % len(COLOURS)], "error_kw": {"elinewidth": 0.8, "ecolor": "#444444"}}
            axes.barh(places, middle, thickness * 0.9, xerr=errors, label=LABELS[method], **style)
            known = [(printed[method][task], place) for task, place in zip(tasks, places, strict=True)
                     if task in printed.get(method, {})]  # fmt: skip
            if known:
                label = f"{LABELS[method]}, printed"
                axes.plot(*zip(*known, strict=True), "kx" if number else "k+", label=label)
        axes.set_yticks(range(len(tasks)), tasks)
        axes.invert_yaxis()
        axes.set_xlim(0, 103)
        axes.set_xlabel("score (%)")
        _finish(axes, title, "x")
        return save(figure, folder, "by-task")


def _finish(axes: Any, title: str, grid: str) -> None:
    axes.legend(frameon=False)
    axes.grid(axis=grid, color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, loc="left")
