"""Pictures of what was measured on a text (matplotlib): tokens kept, receptive fields, decay curves, mean distances."""

from typing import Any

import numpy as np

from vllm_longmamba.inspect.measure import LayerMeasurement, Measurements
from vllm_longmamba.inspect.pictures import add_layer_bar, layer_colors, new_figure, set_layer_ticks, set_length_ticks
from vllm_longmamba.inspect.summary import kept_by_layer
from vllm_longmamba.tables import ThresholdTable

# Receptive fields are drawn down to this power of ten below their largest value.
_MAP_DECADES = 4
# Decay curves: most channels drawn of each kind, and the lowest value shown, in powers of ten.
_MOST_CURVES = 24
_LOWEST_DECAY = -40.0


def kept_picture(table: ThresholdTable, measured: Measurements) -> Any:
    """Share of the tokens that the global channels keep, against the prompt length."""
    length_of_training = table.metadata.train_length
    lengths = [length for length in measured.plain if length >= length_of_training]
    shares = [kept_by_layer(table, measured, length) for length in lengths]
    layers = sorted(shares[0]) if shares else []
    figure = new_figure(7.5, 4.8)
    axes = figure.subplots()
    for layer, color in zip(layers, layer_colors(layers), strict=True):
        axes.plot(lengths, [100 * share[layer] for share in shares], color=color, linewidth=1, marker="o", markersize=3)
    if layers:
        mean = [100 * np.mean(list(share.values())) for share in shares]
        axes.plot(lengths, mean, color="black", linewidth=2.5, label="mean of the layers")
        axes.plot(
            lengths, [100 * min(1.0, length_of_training / length) for length in lengths],
            color="crimson", linestyle="--", label=f"as many as in training ({length_of_training})",
        )  # fmt: skip
        axes.legend()
        set_length_ticks(axes, lengths)
        add_layer_bar(figure, axes, layers)
    axes.set_title(f"Tokens of {measured.text} that enter the global channels")
    axes.set_xlabel("prompt length S (tokens)")
    axes.set_ylabel("tokens kept, mean of the global channels (%)")
    axes.set_yscale("log")
    axes.set_ylim(top=120)
    percent = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if tick >= axes.get_ylim()[0]]
    axes.set_yticks(percent, [f"{tick:g}" for tick in percent])
    axes.set_yticks([], minor=True)
    axes.grid(alpha=0.3)
    return figure


def receptive_field_picture(table: ThresholdTable, measured: Measurements) -> Any:
    """Attention maps of the chosen channels: at the training length, and at the longest prompt plain and filtered."""
    shortest, longest = min(measured.plain), max(measured.plain)
    columns: list[tuple[str, Any, int]] = [(f"S = {shortest}", measured.plain[shortest], shortest)]
    if longest != shortest:
        columns.append((f"S = {longest}, plain", measured.plain[longest], longest))
    if longest in measured.filtered:
        columns.append((f"S = {longest}, filtered", measured.filtered[longest], longest))
    figure = new_figure(1.2 + 3.1 * len(columns), 0.8 + 2.9 * len(measured.channels))
    grid = figure.subplots(len(measured.channels), len(columns), squeeze=False)
    image = None
    for row, (layer, channel) in zip(grid, measured.channels, strict=True):
        kind = "global" if bool(table.is_global(layer)[channel]) else "local"
        for axes, (title, measurement, length) in zip(row, columns, strict=True):
            values = measurement[layer].maps[channel]
            logs = np.log10(np.maximum(values / np.nanmax(values), 10.0**-_MAP_DECADES))
            image = axes.imshow(
                logs, extent=(0, length, length, 0), cmap="magma", vmin=-_MAP_DECADES, vmax=0, interpolation="none"
            )
            axes.set_title(f"{title}\nlayer {layer}, channel {channel} ({kind})", fontsize=9)
            axes.tick_params(labelsize=8)
            axes.set_xticks([0, length // 2, length])
            axes.set_yticks([0, length // 2, length])
        row[0].set_ylabel("token i that reads")
    for axes in grid[-1]:
        axes.set_xlabel("token j that is read")
    figure.colorbar(image, ax=grid, shrink=0.8, label="log₁₀ of |α(i, j)| / largest of the map")
    figure.suptitle(f"Receptive fields on {measured.text}")
    return figure


def decay_picture(table: ThresholdTable, measured: Measurements, layers: list[int]) -> Any:
    """What is left of the first token's state along the longest prompt, for channels of some layers."""
    longest = max(measured.plain)
    figure = new_figure(9.0, 0.8 + 3.2 * -(-len(layers) // 2))
    grid = figure.subplots(-(-len(layers) // 2), 2 if len(layers) > 1 else 1, squeeze=False)
    for axes in grid.flat[len(layers) :]:
        axes.set_visible(False)
    for axes, layer in zip(grid.flat, layers, strict=False):
        is_global = table.is_global(layer).numpy()
        plain, filtered = measured.plain[longest][layer], measured.filtered.get(longest, {}).get(layer)
        _curves(axes, plain, ~is_global, "0.75", "local")
        _curves(axes, plain, is_global, "crimson", "global, plain")
        if filtered is not None:
            _curves(axes, filtered, is_global, "C0", "global, filtered")
            _targets(axes, plain, is_global, table.metadata.train_length)
        axes.axvline(table.metadata.train_length, color="black", linestyle=":", linewidth=1)
        # Local channels leave the picture at its lower edge.
        lowest = float(plain.decay[:, is_global].min()) if is_global.any() else _LOWEST_DECAY
        lowest = max(1.1 * lowest, _LOWEST_DECAY)
        axes.set_ylim(lowest, -0.03 * lowest)
        axes.set_title(f"layer {layer}: {is_global.sum()} of {len(is_global)} channels global", fontsize=10)
        axes.set_ylabel("log₁₀ of the cumulative decay")
        axes.set_xlabel("tokens passed")
        axes.grid(alpha=0.3)
    handles = {label: line for axes in grid.flat for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=9)
    figure.suptitle(f"Memory of the first token on {measured.text} (dotted: training length)")
    return figure


def mean_distance_picture(measured: Measurements) -> Any:
    """How far back each layer looks (Mamba mean distance), for every prompt length, plain and filtered."""
    from matplotlib import colormaps

    figure = new_figure(8.0, 4.8)
    axes = figure.subplots()
    layers = sorted(next(iter(measured.plain.values())))
    colors = colormaps["plasma"](np.linspace(0, 0.8, len(measured.plain)))
    for (length, plain), color in zip(measured.plain.items(), colors, strict=True):
        filtered = measured.filtered.get(length)
        style = {"color": color, "marker": "o", "markersize": 3}
        _distances(axes, layers, plain, {"linestyle": "--" if filtered else "-", **style}, f"S = {length}, plain")
        if filtered is not None:
            _distances(axes, layers, filtered, {"linestyle": "-", **style}, f"S = {length}, filtered")
    axes.set_title(f"How far back the last token of {measured.text} looks")
    axes.set_xlabel("layer")
    axes.set_ylabel("Mamba mean distance, mean of the channels (tokens)")
    set_layer_ticks(axes.xaxis, layers)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=2)
    return figure


def _distances(axes: Any, layers: list[int], measurement: Any, style: dict[str, Any], label: str) -> None:
    axes.plot(range(len(layers)), [measurement[layer].distance.mean() for layer in layers], label=label, **style)


def _shown(which: np.ndarray) -> list[int]:
    """The channels that are drawn: those of a mask, evenly thinned out."""
    channels = np.flatnonzero(which)
    picked = np.linspace(0, len(channels) - 1, min(len(channels), _MOST_CURVES)).round().astype(int)
    shown: list[int] = channels[np.unique(picked)].tolist()
    return shown


def _curves(axes: Any, measurement: LayerMeasurement, which: np.ndarray, color: str, label: str) -> None:
    positions = np.concatenate([[0], measurement.positions])
    for number, channel in enumerate(_shown(which)):
        curve = np.concatenate([[0.0], measurement.decay[:, channel]])
        axes.plot(positions, curve, color=color, linewidth=1, alpha=0.8, label=None if number else label)


def _targets(axes: Any, plain: LayerMeasurement, which: np.ndarray, train_length: int) -> None:
    """Where the filtered curves ought to end: at the plain decay over the training length."""
    targets = [np.interp(train_length, plain.positions, plain.decay[:, channel]) for channel in _shown(which)]
    ends = [plain.positions[-1]] * len(targets)
    axes.plot(ends, targets, "x", color="black", markersize=6, label="decay over the training length")
