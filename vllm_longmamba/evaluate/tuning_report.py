"""The report of `longmamba tune`: every setting tried, the best one marked."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vllm_longmamba.evaluate.markdown import document, interval, table
from vllm_longmamba.evaluate.pictures import COLOURS, Pictures, as_files, figure_with_panels, finish, look
from vllm_longmamba.evaluate.tuning import FOUND_TOLERANCE, Score, as_values

# What tells settings apart beside theta: heading, and words for one.
_VARIED = {
    "clamp_percent": ("C (%)", "C = {:g} %"),
    "budget": ("budget", "budget {:g}"),
    "unfiltered_end": ("unfiltered end", "unfiltered end {:g}"),
}


def summarize_tuning(scores: Sequence[Score], best: Score) -> dict[str, Any]:
    """The scores as plain values: "plain", "tried" (by the settings' numbers, then what is left unfiltered) and "best".

    Args:
        scores: the plain model's first.
        best: one of them.
    """

    def place(score: Score) -> tuple[Any, ...]:
        one = score.candidate
        return one.clamp_percent or 0.0, one.budget, one.unfiltered_end, one.min_retention, one.unfiltered

    tried = [as_values(score) for score in sorted(scores[1:], key=place)]
    return {
        "plain": as_values(scores[0]),
        "tried": tried,
        "best": as_values(best)["candidate"],
        "label": best.candidate.label(),
    }


def tuning_markdown(report: Mapping[str, Any], title: str, pictures: Iterable[str]) -> str:
    """The report as Markdown; arguments as of `questions_markdown`."""
    varied = _varied(report)
    searched = any(score["candidate"]["unfiltered"] for score in report["tried"])
    header = [*(_VARIED[name][0] for name in varied), "theta", *(["unfiltered"] * searched), "global channels"]
    if report["plain"]["found"]:
        header.append("keys found")
    if report["plain"]["loss"]:
        header += ["nats/token", "perplexity", "difference to plain"]
    rows = [["plain", *([""] * (len(varied) + searched)), "0", *_scores(report["plain"])]]
    for score in report["tried"]:
        setting = score["candidate"]
        names = [*(f"{setting[name]:g}" for name in varied), f"{setting['min_retention']:.3g}"]
        names += [", ".join(setting["unfiltered"]) or "-"] * searched
        mark = "**" if setting == report["best"] else ""
        rows.append([*(f"{mark}{name}{mark}" for name in names), str(setting["global_channels"]), *_scores(score)])
    text = (
        f"Best: {report['label']}. It has the smallest loss of the settings whose share of keys found is within "
        f"{FOUND_TOLERANCE:g} of the largest. Intervals: 95 %, Wilson for keys, bootstrap over texts for losses; they "
        "do not allow for the choice of the best of many, so confirm it on other text (`longmamba eval`)."
    )
    return document(report, title, [text, table(header, rows)], pictures)


def draw_tuning(report: Mapping[str, Any]) -> Pictures:
    """Keys found and the loss less that of plain over theta, a curve for each C, budget and unfiltered end.

    Args:
        report: as written to JSON. What was tried with something left unfiltered is in the table only.
    """
    labels = {"found": "keys found", "difference": "nats per token, difference to plain, same windows"}
    kinds = [(name, of) for name, of in (("found", "share"), ("difference", "loss")) if report["plain"][name]]
    varied = _varied(report)
    curves: dict[tuple[float, ...], list[Mapping[str, Any]]] = {}
    for score in report["tried"]:
        if not score["candidate"]["unfiltered"]:
            curves.setdefault(tuple(score["candidate"][name] for name in varied), []).append(score)
    with figure_with_panels(5.2 * len(kinds), 3.8, len(kinds)) as (figure, panels):
        for panel, (kind, of) in zip(panels, kinds, strict=True):
            panel.axhline(report["plain"][kind][of], color=COLOURS[0], linestyle="--", label="plain")
            for number, (fixed, own) in enumerate(curves.items(), start=1):
                thetas = [score["candidate"]["min_retention"] for score in own]
                low, values, high = ([score[kind][end] for score in own] for end in ("low", of, "high"))
                colour, style = look(number)
                label = ", ".join(_VARIED[name][1] for name in varied).format(*fixed) or "LongMamba"
                panel.plot(thetas, values, style, color=colour, marker="o", markersize=4, label=label)
                panel.fill_between(thetas, low, high, color=colour, alpha=0.08, linewidth=0)
            panel.set_xscale("log")
            panel.set_xlabel("theta (min_retention)")
            panel.set_ylabel(labels[kind])
            finish(panel)
        return as_files(figure, "tuning")


def _varied(report: Mapping[str, Any]) -> list[str]:
    """What tells the tables of a report apart."""
    tried = [score["candidate"] for score in report["tried"]]
    return [name for name in _VARIED if len({setting[name] for setting in tried}) > 1]


def _scores(score: Mapping[str, Any]) -> list[str]:
    cells = []
    if score["found"]:
        cells.append(interval(score["found"], "share"))
    if score["loss"]:
        cells += [interval(score["loss"], "loss", ".3f"), f"{score['loss']['perplexity']:.2f}"]
        cells.append(interval(score["difference"], "loss", "+.3f"))
    return cells
