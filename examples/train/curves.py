"""Writes the curves of a run as JSON and as a picture."""

import json
from pathlib import Path
from typing import Any

from .training import Curves


def save_curves(curves: Curves, final: dict[str, Any], path: Path) -> None:
    """Writes path/curves.json and path/curves.png.

    Args:
        curves: of the run.
        final: what was measured at its end.
        path: an existing folder.
    """
    everything = {"final": final, "evaluations": curves.evaluations, "steps": curves.steps}
    (path / "curves.json").write_text(json.dumps(everything, indent=1) + "\n")
    _plot(curves, path / "curves.png")


def _plot(curves: Curves, file: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, label in (("text_loss", "text"), ("answer_loss", "digits of answers")):
        left.plot([entry["step"] for entry in curves.steps], [entry[name] for entry in curves.steps], label=label)
    left.set(xlabel="step", ylabel="loss (nats a byte)", ylim=(0, None))
    left.legend()
    for name, label in (("passkey", "passkey"), ("four_needles", "one of four needles")):
        points = curves.evaluations
        right.plot([entry["step"] for entry in points], [entry[name] for entry in points], marker=".", label=label)
    right.set(xlabel="step", ylabel="answers right", ylim=(-0.03, 1.03))
    right.legend()
    FigureCanvasAgg(figure).print_figure(file, dpi=110)
