"""The report of `longmamba tune`: every setting tried, and what the best one gains on text that did not choose it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from vllm_longmamba.evaluate.markdown import interval, table
from vllm_longmamba.evaluate.pictures import COLOURS, Pictures, as_files, new_figure, share_axis
from vllm_longmamba.evaluate.tuning import FOUND_TOLERANCE, Score, Setting

_HEADER = ["setting", "global channels", "keys found", "nats/token", "difference to plain"]


def summarize_tuning(scores: Sequence[Score], best: Score, held_out: Sequence[Score]) -> dict[str, Any]:
    """The scores as plain values: "plain", "tried" (by the settings' numbers), "best", its "label", and "held_out".

    Args:
        scores: the plain model's first.
        best: one of them.
        held_out: scores on the part of the text that was held out.
    """
    tried = sorted(scores[1:], key=lambda score: tuple(asdict(score.setting).values()))
    return {
        "plain": asdict(scores[0]),
        "tried": [asdict(score) for score in tried],
        "best": asdict(best),
        "label": best.setting.label(),
        "held_out": [asdict(score) for score in held_out],
    }


def tuning_markdown(report: Mapping[str, Any]) -> list[str]:
    """The paragraphs and tables of a search."""
    text = (
        f"Best: {report['label']}. It has the smallest loss of the settings whose share of keys found is within "
        f"{FOUND_TOLERANCE:g} of the largest. Intervals: 95 %, Wilson for keys, bootstrap over texts for losses."
    )
    held = "On the second half of each text, by which nothing was chosen:"
    tried = [report["plain"], *report["tried"]]
    return [text, held, _table(report["held_out"]), "On the first half:", _table(tried)]


def draw_tuning(report: Mapping[str, Any], title: str) -> Pictures:
    """Keys found against the loss of every setting; arguments as of `draw_questions`."""
    figure, [axes] = new_figure(6.5, 4.0, title)
    kinds = [(report["tried"], "tried"), ([report["plain"]], "plain"), ([report["best"]], report["label"])]
    for (scores, label), colour in zip(kinds, (COLOURS[1], COLOURS[0], COLOURS[2]), strict=True):
        losses = [score["loss"]["loss"] for score in scores]
        axes.scatter(losses, [score["found"]["share"] for score in scores], color=colour, label=label)
    share_axis(axes)
    axes.set_xlabel("nats per token")
    axes.set_ylabel("keys found")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return as_files(figure, "tuning")


def _table(scores: Iterable[Mapping[str, Any]]) -> str:
    lines = [
        [
            Setting(**score["setting"]).label(),
            str(score["global_channels"]),
            interval(score["found"], "share"),
            interval(score["loss"], "loss", ".3f"),
            interval(score["difference"], "loss", "+.3f"),
        ]
        for score in scores
    ]
    return table(_HEADER, lines)
