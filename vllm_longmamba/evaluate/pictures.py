"""Pictures of a report, as PNG and SVG: heat maps of length and depth, and curves over length."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from vllm_longmamba.evaluate.engine import LABELS

# File name -> content.
Pictures = dict[str, bytes]
# Colours that colour-blind readers can tell apart (Okabe and Ito), in the order of the methods.
COLOURS = ("#767676", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_MAX_NUMBERED_CELLS = 240


def draw_questions(report: Mapping[str, Any], title: str) -> Pictures:
    """The share of numbers found: heat maps by length and depth, and curves over length.

    Args:
        report: as written to JSON.
        title: of both pictures.
    """
    return draw_heat_maps(report, title) | draw_shares(report, report["by_length"], title, "numbers found")


def draw_perplexity(report: Mapping[str, Any], title: str) -> Pictures:
    """The loss over the length of the window, and what each method changes; arguments as above."""
    rows = report["by_length"]
    differences = [row | row["difference"] for row in rows if "difference" in row]
    columns = 2 if differences else 1
    figure, panels = new_figure(5.6 * columns, 4.0, title, columns)
    draw_curves(panels[0], report, rows, "loss")
    panels[0].set_ylabel(f"nats per token, last {report['settings']['scored_tokens']} tokens")
    if differences:
        panels[1].axhline(0.0, color=COLOURS[0], linewidth=2)
        draw_curves(panels[1], report, differences, "loss")
        panels[1].set_ylabel(f"difference to {LABELS[report['compared_with']]}, same windows")
    for panel in panels:
        panel.set_xlabel("window (tokens)")
    return as_files(figure, "perplexity")


def draw_shares(report: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], title: str, label: str) -> Pictures:
    """Curves of shares over length.

    Args:
        report: as written to JSON.
        rows: of method, length, share, low, high.
        title, label: of the picture, of the shares.
    """
    figure, [axes] = new_figure(7.5, 4.0, title)
    draw_curves(axes, report, rows, "share")
    share_axis(axes)
    axes.set_xlabel("prompt (tokens)")
    axes.set_ylabel(label)
    return as_files(figure, "by-length")


def draw_heat_maps(report: Mapping[str, Any], title: str) -> Pictures:
    """The share of numbers found by length and depth, a panel for each method."""
    import numpy as np

    cells, methods = report["by_depth"], list(report["methods"])
    lengths = sorted({cell["length"] for cell in cells})
    depths = sorted({cell["depth"] for cell in cells})
    width, height = max(3.2, 0.62 * len(lengths) + 1.0), max(3.0, 0.3 * len(depths) + 1.6)
    figure, panels = new_figure(width * len(methods) + 1.2, height, title, len(methods))
    for panel, method in zip(panels, methods, strict=True):
        shares = np.full((len(depths), len(lengths)), np.nan)
        for cell in cells:
            if cell["method"] == method:
                shares[depths.index(cell["depth"]), lengths.index(cell["length"])] = cell["share"]
        image = panel.imshow(shares, cmap="cividis", vmin=0, vmax=1, aspect="auto")
        if shares.size <= _MAX_NUMBERED_CELLS:
            for (row, column), share in np.ndenumerate(shares):
                colour = "white" if share < 0.5 else "black"
                panel.text(column, row, f"{100 * share:.0f}", ha="center", va="center", color=colour, size=8)
        panel.set_title(LABELS[method], loc="left")
        panel.set_xticks(range(len(lengths)), [_short(length) for length in lengths])
        panel.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths] if panel is panels[0] else [])
        panel.set_xlabel("prompt (tokens)")
        panel.tick_params(length=0)
        panel.spines[:].set_visible(False)
    panels[0].set_ylabel("depth in the text")
    figure.colorbar(image, ax=panels, label="found", format=lambda share, _: f"{share:.0%}", pad=0.02)
    return as_files(figure, "heat-map")


def draw_curves(axes: Any, report: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], name: str) -> None:
    """A value of rows with its interval over length, a curve for each method of the report."""
    for number, method in enumerate(report["methods"]):
        own = sorted((row["length"], row) for row in rows if row["method"] == method)
        if not own:
            continue
        lengths = [length for length, _ in own]
        low, middle, high = ([row[end] for _, row in own] for end in ("low", name, "high"))
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(lengths, middle, color=colour, marker="o", markersize=5, linewidth=2, label=LABELS[method])
        axes.fill_between(lengths, low, high, color=colour, alpha=0.15, linewidth=0)
    lengths = sorted({row["length"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [_short(length) for length in lengths])
    axes.minorticks_off()
    for length in {values["train_length"] for values in report["methods"].values() if "train_length" in values}:
        axes.axvline(length, color="#999999", linestyle="--", linewidth=1)
        place = {"xycoords": ("data", "axes fraction"), "xytext": (3, 6), "textcoords": "offset points"}
        axes.annotate("trained on", (length, 0.0), **place, rotation=90, size=8, color="#666666")
    axes.legend(frameon=False, handlelength=3)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def share_axis(axes: Any) -> None:
    """Make the vertical axis one of shares."""
    axes.set_ylim(-0.03, 1.03)
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")


def new_figure(width: float, height: float, title: str, columns: int = 1) -> tuple[Any, list[Any]]:
    """A matplotlib figure with panels side by side; width and height are in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", parse_math=False)
    return figure, list(figure.subplots(1, columns, squeeze=False).flat)


def as_files(figure: Any, name: str) -> Pictures:
    """A figure as PNG and SVG, the latter with text as text; equal figures give the same bytes."""
    from matplotlib import rc_context

    png, svg = io.BytesIO(), io.BytesIO()
    figure.savefig(png, format="png", dpi=150)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "longmamba"}):
        figure.savefig(svg, format="svg", metadata={"Date": None})
    return {f"{name}.png": png.getvalue(), f"{name}.svg": svg.getvalue()}


def _short(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)
