"""The report of `longmamba tune`: every setting tried, the best one marked."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm_longmamba.evaluate.markdown import conditions, images, interval, table
from vllm_longmamba.evaluate.pictures import COLOURS, figure_with_panels, look, save
from vllm_longmamba.evaluate.tuning import FOUND_TOLERANCE, Score

_COLUMNS = {"clamp_percent": "C (%)", "budget": "budget", "unfiltered_end": "unfiltered end"}
_LABELS = {"clamp_percent": "C = {:g} %", "budget": "budget {:g}", "unfiltered_end": "unfiltered end {:g}"}


def summarize_tuning(scores: Sequence[Score], best: Score) -> dict[str, Any]:
    """The scores as plain values: "plain", "tried" (by the settings' numbers, then what is left unfiltered) and "best".

    "best" has what tells settings apart: no C in the closed loop, elsewhere no budget where none but 1 was tried, no
    unfiltered end where none was.
    """
    is_closed_loop = best.candidate.clamp_percent is None
    names: tuple[str, ...] = () if is_closed_loop else ("clamp_percent",)
    if is_closed_loop or any(score.candidate.budget != 1 for score in scores):
        names += ("budget",)
    if any(score.candidate.unfiltered_end for score in scores):
        names += ("unfiltered_end",)
    names += ("min_retention",)
    if any(score.candidate.unfiltered for score in scores):
        names += ("unfiltered",)
    tried = [_as_values(score, names) for score in scores[1:]]
    return {
        "plain": _as_values(scores[0], names),
        "tried": sorted(tried, key=lambda score: [score["candidate"][name] for name in names]),
        "best": {name: _as_values(best, names)["candidate"][name] for name in names},
    }


def tuning_markdown(report: Mapping[str, Any], pictures: Sequence[str]) -> str:
    """The report as Markdown.

    Args:
        report: as written to JSON.
        pictures: file names of pictures beside it.
    """
    best, varied = report["best"], _varied(report)
    closed = _is_closed_loop(report)
    header = [*(_COLUMNS[name] for name in varied), "theta", "global channels"]
    if report["plain"]["found"]:
        header.append("keys found")
    if report["plain"]["loss"]:
        header += ["nats/token", "perplexity", "difference to plain"]
    searched = "unfiltered" in best
    if searched:
        header.insert(len(varied) + 1, "unfiltered")
    rows = [["plain", *([""] * (len(varied) + searched)), "0", *_scores(report["plain"])]]
    for score in report["tried"]:
        setting = score["candidate"]
        mark = "**" if all(setting[name] == best[name] for name in best) else ""
        names = [*(f"{setting[name]:g}" for name in varied), f"{setting['min_retention']:.3g}"]
        if searched:
            names.append(", ".join(setting["unfiltered"]) or "-")
        cells = [*(f"{mark}{name}{mark}" for name in names), str(setting["global_channels"]), *_scores(score)]
        rows.append(cells)
    left_out = f", without {', '.join(best['unfiltered'])}" if best.get("unfiltered") else ""
    chosen = "".join(f"{name} {best[name]:g}, " for name in varied)
    text = (
        f"Best: {chosen}min_retention {best['min_retention']:.3g}{left_out}. It has the "
        f"smallest loss of the settings whose share of keys found is within {FOUND_TOLERANCE:g} of the largest. "
        "Intervals: 95 %, Wilson for keys, bootstrap over texts for losses; they do not allow for the choice of the "
        "best of many, so confirm it on other text (`longmamba eval`)."
    )
    title = "# Tuning of the closed loop" if closed else "# Tuning"
    if closed:
        text = f"Closed-loop calibration, for every theta a table of its own. {text}"
    return "\n\n".join([title, text, table(header, rows), *images(pictures), conditions(report)]) + "\n"


def draw_tuning(report: Mapping[str, Any], folder: Path) -> list[str]:
    """Draw keys found and the loss less that of plain over theta, a curve for each C, budget and unfiltered end.

    Args:
        report: as written to JSON.
        folder: takes the pictures.

    Returns:
        The name of the PNG file.
    """
    kinds = [(name, of) for name, of in (("found", "share"), ("difference", "loss")) if report["plain"][name]]
    labels = {"found": "keys found", "difference": "nats per token, difference to plain, same windows"}
    varied = _varied(report)
    label = ", ".join(_LABELS[name] for name in varied)
    if _is_closed_loop(report):
        label = f"closed loop, {label}"
    # Over theta: what was tried with something left unfiltered is in the table only.
    over_theta = [score for score in report["tried"] if not score["candidate"].get("unfiltered")]

    def curve(setting: Mapping[str, Any]) -> tuple[float, ...]:
        return tuple(setting[name] for name in varied)

    curves = sorted({curve(score["candidate"]) for score in over_theta})
    with figure_with_panels(5.2 * len(kinds), 3.8, len(kinds)) as (figure, panels):
        for panel, (kind, of) in zip(panels, kinds, strict=True):
            panel.axhline(report["plain"][kind][of], color=COLOURS[0], linestyle="--", label="plain")
            for number, fixed in enumerate(curves, start=1):
                own = [score for score in over_theta if curve(score["candidate"]) == fixed]
                thetas = [score["candidate"]["min_retention"] for score in own]
                values = [score[kind][of] for score in own]
                style, colour = look(number)
                panel.plot(thetas, values, style, color=colour, marker="o", markersize=4, label=label.format(*fixed))
                panel.fill_between(
                    thetas, *([score[kind][end] for score in own] for end in ("low", "high")),
                    color=colour, alpha=0.08, linewidth=0,
                )  # fmt: skip
                for theta, value in zip(thetas, values, strict=True):
                    if (curve(report["best"]), report["best"]["min_retention"]) == (fixed, theta):
                        panel.plot(theta, value, marker="o", markersize=11, fillstyle="none", color="black")
            panel.set_xscale("log")
            panel.set_xlabel("theta (min_retention)")
            panel.set_ylabel(labels[kind])
            panel.grid(axis="y", color="#dddddd", linewidth=0.8)
            panel.spines[["top", "right"]].set_visible(False)
        panels[-1].legend(frameon=False)
        return [save(figure, folder, "tuning")]


def _as_values(score: Score, names: Sequence[str]) -> dict[str, Any]:
    """As JSON has it: what is left unfiltered as a list, or not at all where that was not searched."""
    values = asdict(score)
    unfiltered = values["candidate"].pop("unfiltered")
    if "unfiltered" in names:
        values["candidate"]["unfiltered"] = list(unfiltered)
    return values


def _varied(report: Mapping[str, Any]) -> list[str]:
    """What tells the tables of a report apart."""
    return [name for name in _COLUMNS if name in report["best"]]


def _is_closed_loop(report: Mapping[str, Any]) -> bool:
    return "clamp_percent" not in report["best"]


def _scores(score: Mapping[str, Any]) -> list[str]:
    cells = []
    if score["found"]:
        cells.append(interval(score["found"], "share", ".2f"))
    if score["loss"]:
        cells += [interval(score["loss"], "loss", ".3f"), f"{score['loss']['perplexity']:.2f}"]
        cells.append(interval(score["difference"], "loss", "+.3f"))
    return cells
