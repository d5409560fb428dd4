"""Pictures of a threshold table (matplotlib): how much the channels retain, and how the thresholds grow with S."""

from pathlib import Path
from typing import Any

import numpy as np

from vllm_longmamba.tables import ThresholdTable

FORMATS = ("png", "svg")
LAYER_COLORS = "viridis"
# Retention below this is drawn as this: float64 ends near 1e-308, the paper's search for theta at 1e-40.
_LEAST_RETENTION = 1e-40
_RETENTION_BINS = 40
# With more lines than this, only the colour bar tells the layers.
_NAMED_LINES = 8


def new_figure(width: float, height: float) -> Any:
    """An empty figure of a size in inches, with the style of all pictures.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ValueError("pictures need matplotlib; install it with `pip install 'vllm-longmamba[plot]'`") from error
    return Figure(figsize=(width, height), layout="constrained", dpi=150)


def save(figure: Any, folder: Path, name: str) -> list[Path]:
    """Write a figure in every format; returns the files."""
    files = [folder / f"{name}.{suffix}" for suffix in FORMATS]
    for file in files:
        # Without a date, and with ids that do not change, equal data give equal files.
        metadata = {"Date": None} if file.suffix == ".svg" else None
        with _svg_salt(name):
            figure.savefig(file, metadata=metadata)
    return files


def retention_picture(table: ThresholdTable) -> Any:
    """Histogram of the channels' retention in every layer, with the border between local and global channels."""
    figure = new_figure(10.0, _height(len(table.layers)))
    from matplotlib.colors import PowerNorm

    theta = table.metadata.min_retention
    layers = sorted(table.layers)
    logs = [np.log10(np.maximum(table.layers[layer].retention.numpy(), _LEAST_RETENTION)) for layer in layers]
    lowest = min(float(values.min()) for values in logs)
    edges = np.linspace(np.floor(min(lowest, np.log10(max(theta, _LEAST_RETENTION)) - 1)), 0, _RETENTION_BINS + 1)
    shares = np.array([np.histogram(values, edges)[0] / len(values) for values in logs])

    axes, bars = figure.subplots(1, 2, sharey=True, width_ratios=[3, 1])
    rows = np.arange(len(layers) + 1) - 0.5
    percent = np.where(shares > 0, 100 * shares, np.nan)
    # The square root keeps single channels visible beside the many that retain nothing.
    mesh = axes.pcolormesh(edges, rows, percent, cmap="Blues", norm=PowerNorm(0.5, vmin=0), rasterized=True)
    border = np.log10(max(theta, _LEAST_RETENTION))
    axes.axvline(border, color="crimson", linewidth=1.5)
    axes.annotate(
        f"θ = {theta:g}", (border, 1.0), xycoords=("data", "axes fraction"), xytext=(0, 2),
        textcoords="offset points", color="crimson", ha="center", va="bottom",
    )  # fmt: skip
    axes.set_title(f"Retention of the channels of {table.metadata.model_id}", loc="left")
    axes.set_xlabel(f"log₁₀ of the retention over {table.metadata.train_length} tokens (smaller ones: at the left end)")
    axes.set_ylabel("layer")
    global_shares = [100 * float(table.is_global(layer).double().mean()) for layer in layers]
    bars.barh(range(len(layers)), global_shares, color="crimson", height=0.8)
    bars.set_title("Global channels")
    bars.set_xlabel("channels of the layer (%)")
    bars.set_xlim(0, min(100.0, max(10.0, 1.2 * max(global_shares))))
    bars.grid(axis="x", alpha=0.3)
    figure.colorbar(mesh, ax=[axes, bars], label="channels of the layer (%)", aspect=30)
    set_layer_ticks(axes.yaxis, layers)
    axes.set_ylim(len(layers) - 0.5, -0.5)
    return figure


def threshold_picture(table: ThresholdTable) -> Any:
    """Median threshold of each layer's global channels against the prompt length."""
    layers = [layer for layer in sorted(table.layers) if bool(table.is_global(layer).any())]
    lengths = table.row_lengths[1:]
    figure = new_figure(7.5, 4.8)
    axes = figure.subplots()
    for layer, color in zip(layers, layer_colors(layers), strict=True):
        of_global = table.layers[layer].dt_threshold[1:][:, table.is_global(layer)].numpy()
        marker = "o" if len(lengths) < 30 else None
        medians = np.median(of_global, axis=1)
        axes.plot(lengths, medians, color=color, linewidth=1.2, marker=marker, markersize=3)
        if len(layers) <= _NAMED_LINES:
            axes.annotate(f"layer {layer} ", (lengths[-1], medians[-1]), ha="right", va="bottom", fontsize=8)
    axes.set_title(f"Thresholds of {table.metadata.model_id}: tokens of a smaller Δt are filtered")
    axes.set_xlabel("prompt length S (tokens)")
    axes.set_ylabel("g(S), median of the global channels (Δt)")
    axes.set_yscale("log")
    set_length_ticks(axes, [table.metadata.train_length, *lengths.tolist()])
    axes.axvline(table.metadata.train_length, color="0.5", linestyle=":", linewidth=1)
    axes.grid(alpha=0.3)
    add_layer_bar(figure, axes, layers)
    return figure


def layer_colors(layers: list[int]) -> list[Any]:
    """One colour a layer, from dark to light with its index."""
    from matplotlib import colormaps

    return [colormaps[LAYER_COLORS](layer / max(max(layers, default=1), 1)) for layer in layers]


def add_layer_bar(figure: Any, axes: Any, layers: list[int]) -> None:
    """A bar that says which colour is which layer."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    mappable = ScalarMappable(Normalize(0, max(max(layers, default=1), 1)), LAYER_COLORS)
    figure.colorbar(mappable, ax=axes, label="layer").ax.yaxis.get_major_locator().set_params(integer=True)


def set_layer_ticks(axis: Any, layers: list[int]) -> None:
    """Label positions 0, 1, ... with the indices of layers, a dozen at most."""
    step = -(-len(layers) // 12)
    axis.set_ticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])


def set_length_ticks(axes: Any, lengths: list[int]) -> None:
    """A logarithmic axis of prompt lengths, with ticks at the first one and its doublings."""
    ticks = [lengths[0]]
    while 2 * ticks[-1] <= lengths[-1]:
        ticks.append(2 * ticks[-1])
    axes.set_xscale("log")
    axes.set_xticks(ticks, [str(tick) for tick in ticks], rotation=30 if len(ticks) > 6 else 0)
    axes.set_xticks([], minor=True)


def _height(layers: int) -> float:
    return min(max(3.2, 1.6 + 0.22 * layers), 14.0)


def _svg_salt(name: str) -> Any:
    from matplotlib import rc_context

    return rc_context({"svg.hashsalt": name})
