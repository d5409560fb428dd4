"""The report of `longmamba tune`: every setting tried, the best one marked."""

from collections.abc import Mapping, Sequence
from typing import Any

from vllm_longmamba.evaluate.markdown import document, interval, table
from vllm_longmamba.evaluate.tuning import FOUND_TOLERANCE, Score, as_values

# What tells settings apart beside theta, and its heading.
_VARIED = {"clamp_percent": "C (%)", "budget": "budget", "unfiltered_end": "unfiltered end"}


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


def tuning_markdown(report: Mapping[str, Any], title: str) -> str:
    """The report as Markdown; arguments as of `questions_markdown`."""
    varied = _varied(report)
    searched = any(score["candidate"]["unfiltered"] for score in report["tried"])
    header = [*(_VARIED[name] for name in varied), "theta", *(["unfiltered"] * searched), "global channels"]
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
    return document(report, title, [text, table(header, rows)])


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
