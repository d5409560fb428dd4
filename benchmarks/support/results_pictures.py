"""The pictures of README.md and docs/results.md."""

import json
from collections.abc import Iterator
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot

from .evidence_pictures import draw_evidence

STOCK, OURS = "#b0413e", "#1f6f8b"


def draw_pictures(results: Path, folder: Path) -> Iterator[Path]:
    """Draw all, and return the files one by one.

    Args:
        results: folder of the records.
        folder: for the pictures.
    """
    folder.mkdir(parents=True, exist_ok=True)
    yield _prefill(results, folder / "prefill.png")
    yield from draw_evidence(results / "evidence", folder)


def _prefill(results: Path, file: Path) -> Path:
    """Prompt tokens a second against the length of the prompt: stock vLLM and LongMamba."""
    every = json.loads((results / "whole_models.json").read_text())["models"]
    models = {name: result for name, result in every.items() if result.get("prefill")}
    figure, panels = pyplot.subplots(1, len(models), figsize=(3 * len(models), 2.9), squeeze=False)
    for axes, (name, result) in zip(panels[0], models.items(), strict=True):
        lengths = [int(length) for length in result["prefill"]]
        for mode, label, colour in (("stock", "stock vLLM", STOCK), ("on", "LongMamba", OURS)):
            speeds = [length / result["prefill"][f"{length}"][mode]["median"] / 1000 for length in lengths]
            axes.plot([length / 1024 for length in lengths], speeds, "o-", color=colour, label=label, markersize=4)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("prompt, thousand tokens", fontsize=8)
        axes.set_ylim(0, None)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
    panels[0][0].set_ylabel("thousand tokens a second")
    figure.tight_layout(rect=(0, 0, 1, 0.91))
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=len(labels), frameon=False, fontsize=9)
    figure.savefig(file, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return file
