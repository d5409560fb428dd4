"""The pictures of docs/evidence.md: keys found and perplexity of text against the length of the prompt."""

from collections.abc import Iterator
from math import exp
from pathlib import Path

from matplotlib import pyplot
from matplotlib.axes import Axes

from .evidence_cells import Evidence, name_of
from .evidence_tables import DEFAULT, KINDS, LENGTHS, MAIN, short

TRAIN_LENGTH = 2048
COLOURS = {"plain": "#b0413e", "paper": "#c9a227", DEFAULT: "#1f6f8b"}
NAMES = {
    "plain": "plain",
    "paper": "the paper's method, C and theta searched",
    DEFAULT: "default settings",
}


def draw_evidence(records: Path, folder: Path) -> Iterator[Path]:
    """Draw all, and return the files one by one; none without records.

    Args:
        records: folder of the records.
        folder: for the pictures.
    """
    evidence = Evidence(records)
    if evidence.models:
        yield _keys(evidence, folder / "evidence-keys.png")
        yield _text(evidence, folder / "evidence-text.png")


def _keys(evidence: Evidence, file: Path) -> Path:
    """A row a kind of haystack, a column a model."""
    columns = len(evidence.models)
    figure, panels = pyplot.subplots(
        len(KINDS), columns, figsize=(3.2 * columns + 0.4, 6.6), sharex=True, sharey=True, squeeze=False
    )
    for row, (kind, name) in zip(panels, KINDS.items(), strict=True):
        for axes, model in zip(row, evidence.models, strict=True):
            for method in MAIN:
                found = {length: evidence.share(model, method, "passkey", kind, length) for length in LENGTHS}
                points = [(length, *share) for length, share in found.items() if share]
                if points:
                    lengths, shares, low, high = zip(*points, strict=True)
                    _line(axes, method, lengths, shares)
                    axes.fill_between(lengths, low, high, color=COLOURS[method], alpha=0.15, linewidth=0)
            axes.set_ylim(-0.03, 1.05)
            _length_axis(axes)
        row[0].set_ylabel(f"keys found,\n{name}", fontsize=8)
    return _finish(figure, panels, evidence, file)


def _text(evidence: Evidence, file: Path) -> Path:
    columns = len(evidence.models)
    figure, panels = pyplot.subplots(1, columns, figsize=(3.2 * columns + 0.4, 3.0), sharex=True, squeeze=False)
    for axes, model in zip(panels[0], evidence.models, strict=True):
        for method in MAIN:
            losses = {length: evidence.loss(model, method, length) for length in LENGTHS}
            points = [(length, exp(loss)) for length, loss in losses.items() if loss is not None]
            if points:
                _line(axes, method, *zip(*points, strict=True))
        _length_axis(axes)
    panels[0][0].set_ylabel("perplexity, last 100 tokens", fontsize=8)
    return _finish(figure, panels, evidence, file)


def _line(axes: Axes, method: str, lengths: tuple[int, ...], figures: tuple[float, ...]) -> None:
    axes.plot(lengths, figures, "o-", color=COLOURS[method], label=NAMES[method], markersize=3)


def _length_axis(axes: Axes) -> None:
    axes.set_xscale("log", base=2)
    ticks = LENGTHS[::2]
    axes.set_xticks(ticks, [short(length) for length in ticks])
    axes.axvline(TRAIN_LENGTH, color="grey", linewidth=0.8, linestyle=":")
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.25)


def _finish(figure: pyplot.Figure, panels: object, evidence: Evidence, file: Path) -> Path:
    for axes, model in zip(panels[0], evidence.models, strict=True):  # type: ignore[index]
        axes.set_title(name_of(model), fontsize=9)
    for axes in panels[-1]:  # type: ignore[index]
        axes.set_xlabel("prompt, tokens (dotted: training length)", fontsize=7)
    figure.tight_layout(rect=(0, 0, 1, 0.93))
    handles, labels = panels[0][0].get_legend_handles_labels()  # type: ignore[index]
    figure.legend(handles, labels, loc="upper center", ncols=len(labels), frameon=False, fontsize=8)
    figure.savefig(file, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return file
