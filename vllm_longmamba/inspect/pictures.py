"""Pictures (matplotlib) of a threshold table, and of what was measured with it on a text."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vllm_longmamba.inspect.measure import Measurements
from vllm_longmamba.inspect.summary import kept_by_layer, threshold_medians
from vllm_longmamba.tables import ThresholdTable

_LAYER_COLORS = "viridis"
# Retention below this is drawn as this: float64 ends near 1e-308, the paper's search for theta at 1e-40.
_LEAST_RETENTION = 1e-40
_RETENTION_BINS = 40
# Receptive fields are drawn down to this power of ten below their largest value.
_MAP_DECADES = 4


def retention_picture(table: ThresholdTable) -> Any:
    """Histogram of the channels' retention in every layer, with the border between local and global channels."""
    layers = sorted(table.layers)
    figure, axes = _new_figure(8.0, min(max(3.2, 1.6 + 0.22 * len(layers)), 14.0))
    from matplotlib.colors import PowerNorm

    theta = table.metadata.min_retention
    border = np.log10(max(theta, _LEAST_RETENTION))
    logs = [np.log10(np.maximum(table.layers[layer].retention.numpy(), _LEAST_RETENTION)) for layer in layers]
    lowest = min(float(values.min()) for values in logs)
    edges = np.linspace(np.floor(min(lowest, border - 1)), 0, _RETENTION_BINS + 1)
    shares = np.array([np.histogram(values, edges)[0] / len(values) for values in logs])
    rows = np.arange(len(layers) + 1) - 0.5
    percent = np.where(shares > 0, 100 * shares, np.nan)
    # The square root keeps single channels visible beside the many that retain nothing.
    mesh = axes.pcolormesh(edges, rows, percent, cmap="Blues", norm=PowerNorm(0.5, vmin=0), rasterized=True)
    axes.axvline(border, color="crimson", linewidth=1.5)
    axes.set_title(f"Retention of the channels of {table.metadata.model_id} (red: θ = {theta:g})")
    axes.set_xlabel(f"log₁₀ of the retention over {table.metadata.train_length} tokens (smaller ones: at the left end)")
    axes.set_ylabel("layer")
    step = -(-len(layers) // 12)
    axes.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    axes.set_ylim(len(layers) - 0.5, -0.5)
    figure.colorbar(mesh, ax=axes, label="channels of the layer (%)")
    return figure


def threshold_picture(table: ThresholdTable) -> Any:
    """Median threshold of each layer's global channels against the prompt length."""
    # Row 0 filters nothing.
    medians = {layer: of_rows[1:] for layer, of_rows in threshold_medians(table).items()}
    figure, axes = _layers_by_length(table.row_lengths[1:].tolist(), medians)
    axes.set_title(f"Thresholds of {table.metadata.model_id}: tokens of a smaller Δt are filtered")
    axes.set_ylabel("g(S), median of the global channels (Δt)")
    axes.axvline(table.metadata.train_length, color="0.5", linestyle=":", linewidth=1)
    return figure


def kept_picture(table: ThresholdTable, measured: Measurements) -> Any:
    """Share of the tokens that the global channels keep, against the prompt length."""
    train_length = table.metadata.train_length
    lengths = [length for length in measured.plain if length >= train_length]
    shares = [kept_by_layer(table, measured, length) for length in lengths]
    layers = sorted(shares[0]) if shares else []
    figure, axes = _layers_by_length(lengths, {layer: [100 * share[layer] for share in shares] for layer in layers})
    as_in_training = [100 * min(1.0, train_length / length) for length in lengths]
    label = f"as many as in training ({train_length})"
    axes.plot(lengths, as_in_training, color="crimson", linestyle="--", label=label)
    axes.legend()
    axes.set_title(f"Tokens of {measured.text} that enter the global channels")
    axes.set_ylabel("tokens kept, mean of the global channels (%)")
    return figure


def receptive_field_picture(table: ThresholdTable, measured: Measurements) -> Any:
    """Attention maps of the chosen channels: at the training length, and at the longest prompt plain and filtered."""
    shortest, longest = min(measured.plain), max(measured.plain)
    columns: list[tuple[str, Any, int]] = [(f"S = {shortest}", measured.plain[shortest], shortest)]
    if longest != shortest:
        columns.append((f"S = {longest}, plain", measured.plain[longest], longest))
    if longest in measured.filtered:
        columns.append((f"S = {longest}, filtered", measured.filtered[longest], longest))
    shape = len(measured.channels), len(columns)
    figure, grid = _new_figure(1.2 + 3.1 * shape[1], 0.8 + 2.9 * shape[0], shape)
    for row, (layer, channel) in zip(grid, measured.channels, strict=True):
        kind = "global" if bool(table.is_global(layer)[channel]) else "local"
        for axes, (title, measurement, length) in zip(row, columns, strict=True):
            values = measurement[layer].maps[channel]
            logs = np.log10(np.maximum(values / np.nanmax(values), 10.0**-_MAP_DECADES))
            image = axes.imshow(
                logs, extent=(0, length, length, 0), cmap="magma", vmin=-_MAP_DECADES, vmax=0, interpolation="none"
            )
            axes.set_title(f"{title}\nlayer {layer}, channel {channel} ({kind})", fontsize=9)
            axes.set_xticks([0, length // 2, length])
            axes.set_yticks([0, length // 2, length])
        row[0].set_ylabel("token i that reads")
    for axes in grid[-1]:
        axes.set_xlabel("token j that is read")
    figure.colorbar(image, ax=grid, shrink=0.8, label="log₁₀ of |α(i, j)| / largest of the map")
    figure.suptitle(f"Receptive fields on {measured.text}")
    return figure


def _new_figure(width: float, height: float, shape: tuple[int, int] | None = None) -> tuple[Any, Any]:
    """A figure of a size in inches, and its axes: one, or (rows, columns) of them.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ValueError("pictures need matplotlib; install it with `pip install 'vllm-longmamba[plot]'`") from error
    figure = Figure(figsize=(width, height), layout="constrained", dpi=150)
    return figure, figure.subplots(*(shape or (1, 1)), squeeze=shape is None)


def _layers_by_length(lengths: list[int], values: Mapping[int, Sequence[float] | np.ndarray]) -> tuple[Any, Any]:
    """A line for each layer against the prompt length, both logarithmic, and a bar of the layers' colours."""
    figure, axes = _new_figure(7.5, 4.8)
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    colors = ScalarMappable(Normalize(0, max(max(values, default=1), 1)), colormaps[_LAYER_COLORS])
    for layer, line in values.items():
        marker = "o" if len(lengths) < 30 else None
        axes.plot(lengths, line, color=colors.to_rgba(np.array(layer)), linewidth=1.2, marker=marker, markersize=3)
    figure.colorbar(colors, ax=axes, label="layer").ax.yaxis.get_major_locator().set_params(integer=True)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("prompt length S (tokens)")
    axes.grid(alpha=0.3)
    return figure, axes
