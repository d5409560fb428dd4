"""The pictures of README.md and docs/results.md."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes

from .evidence_pictures import draw_evidence
from .records import DEFAULT, MODELS, of_models

TRAIN_LENGTH = 512
COLOURS = {"plain": "#b0413e", DEFAULT: "#1f6f8b", "LongMamba, paper": "#c9a227"}
NAMES = {"plain": "plain", DEFAULT: "default", "LongMamba, paper": "the paper's settings"}


def draw_pictures(results: Path, folder: Path) -> Iterator[Path]:
    """Draw all, and return the files one by one.

    Args:
        results: folder of the records.
        folder: for the pictures.
    """
    folder.mkdir(parents=True, exist_ok=True)
    yield _lines(results, "passkey", ("plain", DEFAULT), folder / "keys.png")
    yield _lines(results, "perplexity", ("plain", "LongMamba, paper", DEFAULT), folder / "text.png")
    yield _depths(results, folder / "depths.png")
    yield _prefill(results, folder / "prefill.png")
    yield from draw_evidence(results / "evidence", folder)


def _lines(results: Path, task: str, methods: tuple[str, ...], file: Path) -> Path:
    """A panel a model: a figure against the length of the prompt, a line a method."""
    value = "loss" if task == "perplexity" else "share"
    records = of_models(results, task)
    figure, panels = pyplot.subplots(
        1, len(records), figsize=(3 * len(records), 2.9), sharey=value == "share", squeeze=False
    )
    for axes, (model, record) in zip(panels[0], records.items(), strict=True):
        for method in methods:
            rows = [row for row in record["by_length"] if row["method"] == method]
            lengths = [row["length"] for row in rows]
            axes.plot(
                lengths, [row[value] for row in rows], "o-", color=COLOURS[method], label=NAMES[method], markersize=4
            )
            if value == "share":
                low, high = ([row[end] for row in rows] for end in ("low", "high"))
                axes.fill_between(lengths, low, high, color=COLOURS[method], alpha=0.15, linewidth=0)
        _length_axis(axes, MODELS[model])
    panels[0][0].set_ylabel("nats a byte" if value == "loss" else "pass keys found")
    if value == "share":
        panels[0][0].set_ylim(-0.03, 1.05)
    return _save(figure, panels[0][0], file)


def _length_axis(axes: Axes, title: str) -> None:
    axes.set_xscale("log", base=2)
    ticks = [TRAIN_LENGTH * 2**power for power in (0, 2, 4, 6)]
    axes.set_xticks(ticks, [f"{tick}" for tick in ticks])
    axes.axvline(TRAIN_LENGTH, color="grey", linewidth=0.8, linestyle=":")
    axes.set_xlabel("prompt, tokens (dotted: training length)", fontsize=8)
    axes.set_title(title, fontsize=10)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)


def _depths(results: Path, file: Path) -> Path:
    """Keys found by length and place of the key, plain above and the default below."""
    records = of_models(results, "passkey")
    figure, panels = pyplot.subplots(2, len(records), figsize=(3 * len(records), 4.4), sharey=True, squeeze=False)
    for column, (model, record) in enumerate(records.items()):
        for row, method in enumerate(("plain", DEFAULT)):
            axes = panels[row][column]
            cells = {
                (cell["depth"], cell["length"]): cell["share"]
                for cell in record["by_depth"]
                if cell["method"] == method
            }
            depths, lengths = sorted({depth for depth, _ in cells}), sorted({length for _, length in cells})
            image = [[cells[depth, length] for length in lengths] for depth in depths]
            axes.imshow(image, aspect="auto", cmap="RdYlGn", vmin=0, vmax=1, extent=(0, len(lengths), 1, 0))
            axes.set_xticks(
                [place + 0.5 for place in range(len(lengths))], [_short(length) for length in lengths], fontsize=7
            )
            axes.set_title(f"{MODELS[model]}: {NAMES[method]}", fontsize=9)
    for row in panels:
        row[0].set_ylabel("place of the key", fontsize=8)
    figure.tight_layout()
    return _write(figure, file)


def _short(length: int) -> str:
    return f"{length // 1024}k" if length >= 1024 else f"{length}"


def _prefill(results: Path, file: Path) -> Path:
    """Prompt tokens a second against the length of the prompt: stock vLLM and LongMamba."""
    every = json.loads((results / "whole_models.json").read_text())["models"]
    models = {name: result for name, result in every.items() if result.get("prefill")}
    figure, panels = pyplot.subplots(1, len(models), figsize=(3 * len(models), 2.9), squeeze=False)
    for axes, (name, result) in zip(panels[0], models.items(), strict=True):
        lengths = [int(length) for length in result["prefill"]]
        for mode, label, colour in (("stock", "stock vLLM", COLOURS["plain"]), ("on", "LongMamba", COLOURS[DEFAULT])):
            speeds = [length / result["prefill"][f"{length}"][mode]["median"] / 1000 for length in lengths]
            axes.plot([length / 1024 for length in lengths], speeds, "o-", color=colour, label=label, markersize=4)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("prompt, thousand tokens", fontsize=8)
        axes.set_ylim(0, None)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
    panels[0][0].set_ylabel("thousand tokens a second")
    return _save(figure, panels[0][0], file)


def _save(figure: Any, with_labels: Axes, file: Path) -> Path:
    figure.tight_layout(rect=(0, 0, 1, 0.91))
    handles, labels = with_labels.get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=len(labels), frameon=False, fontsize=9)
    return _write(figure, file)


def _write(figure: Any, file: Path) -> Path:
    figure.savefig(file, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return file
