"""Pictures of a report, as PNG and SVG: heat maps of length and depth, and curves over length."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_longmamba.evaluate.methods import LABELS

# Colours that colour-blind readers can tell apart (Okabe and Ito), in the order of the methods.
COLOURS = ("#767676", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
# of the first methods, of those beyond the number of colours, and so on
_LINES = ("-", "--", ":")
_MOST_BANDS = 5
_PANELS_IN_A_ROW = 4
_MAX_NUMBERED_CELLS = 240


def draw_questions(report: Mapping[str, Any], folder: Path, title: str) -> list[str]:
    """Draw the share of numbers found: heat maps by length and depth, and curves over length.

    Args:
        report: as written to JSON.
        folder: takes the pictures.
        title: of both pictures.

    Returns:
        The names of the PNG files.
    """
    return [_draw_heat_maps(report, folder, title), _draw_shares(report, folder, title)]


def draw_perplexity(report: Mapping[str, Any], folder: Path, title: str) -> list[str]:
    """Draw the loss over the length of the window, and what each method changes; arguments and result as above."""
    methods = list(report["methods"])
    rows = report["by_length"]
    others = [row | row["difference"] for row in rows if "difference" in row]
    columns = 2 if others else 1
    with figure_with_panels(5.6 * columns, 4.0, columns) as (figure, panels):
        _curves(panels[0], rows, methods, lambda row: (row["loss"], row["low"], row["high"]))
        panels[0].set_ylabel(f"nats per token, last {report['settings']['scored_tokens']} tokens")
        if others:
            panels[1].axhline(0.0, color=COLOURS[0], linewidth=2)
            _curves(panels[1], others, methods, lambda row: (row["loss"], row["low"], row["high"]))
            panels[1].set_ylabel(f"difference to {LABELS[report['compared_with']]}, same windows")
        for panel in panels:
            _length_axis(panel, rows, report)
            panel.set_xlabel("window (tokens)")
        figure.suptitle(title, x=0.01, ha="left")
        return [save(figure, folder, "perplexity")]


def _draw_heat_maps(report: Mapping[str, Any], folder: Path, title: str) -> str:
    import numpy as np

    cells = report["by_depth"]
    methods = list(report["methods"])
    lengths = sorted({cell["length"] for cell in cells})
    depths = sorted({cell["depth"] for cell in cells})
    width = max(3.2, 0.62 * len(lengths) + 1.0)
    height = max(3.0, 0.3 * len(depths) + 1.6)
    columns = min(len(methods), _PANELS_IN_A_ROW)
    rows = -(-len(methods) // columns)
    with figure_with_panels(width * columns + 1.2, height * rows, columns, rows) as (figure, panels):
        for panel in panels[len(methods) :]:
            panel.set_visible(False)
        for number, (panel, method) in enumerate(zip(panels, methods, strict=False)):
            shares = np.full((len(depths), len(lengths)), np.nan)
            for cell in cells:
                if cell["method"] == method:
                    shares[depths.index(cell["depth"]), lengths.index(cell["length"])] = cell["share"]
            image = panel.imshow(shares, cmap="cividis", vmin=0, vmax=1, aspect="auto")
            if shares.size <= _MAX_NUMBERED_CELLS:
                for (row, column), share in np.ndenumerate(shares):
                    if not np.isnan(share):
                        colour = "white" if share < 0.5 else "black"
                        panel.text(column, row, f"{100 * share:.0f}", ha="center", va="center", color=colour, size=8)
            panel.set_title(LABELS[method], loc="left")
            panel.set_xticks(range(len(lengths)), [_short(length) for length in lengths])
            panel.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths] if number % columns == 0 else [])
            panel.set_xlabel("prompt (tokens)")
            panel.tick_params(length=0)
            panel.spines[:].set_visible(False)
        for panel in panels[::columns]:
            panel.set_ylabel("depth in the text")
        figure.colorbar(image, ax=panels, label="found", format=lambda share, _: f"{share:.0%}", pad=0.02)
        figure.suptitle(title, x=0.01, ha="left")
        return save(figure, folder, "heat-map")


def _draw_shares(report: Mapping[str, Any], folder: Path, title: str) -> str:
    rows = report["by_length"]
    with figure_with_panels(7.5, 4.0) as (figure, [axes]):
        _curves(axes, rows, list(report["methods"]), lambda row: (row["share"], row["low"], row["high"]))
        _length_axis(axes, rows, report)
        axes.set_ylim(-0.03, 1.03)
        axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        axes.set_xlabel("prompt (tokens)")
        axes.set_ylabel("numbers found")
        axes.set_title(title, loc="left")
        return save(figure, folder, "by-length")


def _curves(
    axes: Any,
    rows: Sequence[Mapping[str, Any]],
    methods: Sequence[str],
    values: Callable[[Mapping[str, Any]], tuple[float, float, float]],
) -> None:
    for number, method in enumerate(methods):
        own = [row for row in rows if row["method"] == method]
        if not own:
            continue
        lengths = [row["length"] for row in own]
        middle, low, high = zip(*map(values, own), strict=True)
        style, colour = look(number)
        axes.plot(lengths, middle, style, color=colour, marker="o", markersize=5, linewidth=2, label=LABELS[method])
        if len(methods) <= _MOST_BANDS:
            axes.fill_between(lengths, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.legend(frameon=False, handlelength=3)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def look(number: int) -> tuple[str, str]:
    """Line and colour of a method; the first, mostly plain, has its grey for itself."""
    turn, place = divmod(max(number - 1, 0), len(COLOURS) - 1)
    return _LINES[turn % len(_LINES)], COLOURS[1 + place if number else 0]


def _length_axis(axes: Any, rows: Sequence[Mapping[str, Any]], report: Mapping[str, Any]) -> None:
    lengths = sorted({row["length"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [_short(length) for length in lengths])
    axes.minorticks_off()
    known = {values["train_length"] for values in report["methods"].values() if "train_length" in values}
    for length in known:
        axes.axvline(length, color="#999999", linestyle="--", linewidth=1)
        axes.annotate(
            "trained on", (length, 0.0), xycoords=("data", "axes fraction"), xytext=(3, 6),
            textcoords="offset points", rotation=90, size=8, color="#666666",
        )  # fmt: skip


def _short(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)


@contextmanager
def figure_with_panels(width: float, height: float, columns: int = 1, rows: int = 1) -> Iterator[tuple[Any, list[Any]]]:
    """A matplotlib figure with panels, row by row.

    Args:
        width, height: in inches.
        columns, rows: number of panels.
    """
    import matplotlib

    # SVG with text as text, the same bytes each time.
    settings = {"svg.fonttype": "none", "svg.hashsalt": "longmamba", "font.size": 9, "axes.titlesize": 10}
    with matplotlib.rc_context(settings):
        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(rows, columns, figsize=(width, height), squeeze=False, layout="constrained")
        try:
            yield figure, list(axes.flat)
        finally:
            pyplot.close(figure)


def save(figure: Any, folder: Path, name: str) -> str:
    """Write a figure as PNG and SVG; returns the name of the PNG file."""
    figure.savefig(folder / f"{name}.png", dpi=150)
    figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    return f"{name}.png"
