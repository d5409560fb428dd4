"""A threshold table, and what was measured with it, as tables for the terminal."""

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from vllm_longmamba.inspect.measure import Measurement, Measurements
from vllm_longmamba.tables import ThresholdTable


def default_lengths(table: ThresholdTable) -> list[int]:
    """Some prompt lengths that a table filters: 2, 4 and 8 training lengths, as far as it goes."""
    lengths = [factor * table.metadata.train_length for factor in (2, 4, 8)]
    return [length for length in lengths if length <= table.row_lengths[-1]] or [int(table.row_lengths[-1])]


def provenance(table: ThresholdTable, source: str, own_theta: float) -> Table:
    """Where a table comes from (`source`, a file with `own_theta`), one line a fact."""
    metadata = table.metadata
    theta = metadata.min_retention
    rows = table.row_lengths
    grid = Table(title="Threshold table", title_justify="left", show_header=False, box=None)
    grid.add_column(style="bold")
    grid.add_column(overflow="fold")
    facts = {
        "file": source,
        "model": metadata.model_id,
        "weights": metadata.weights_fingerprint[:16],
        "training length": f"{metadata.train_length} tokens",
        "rows": f"{len(rows) - 1}, for prompts of {rows[1] if len(rows) > 1 else rows[0]} to {rows[-1]} tokens",
        "min_retention": f"{theta:g}" + ("" if theta == own_theta else f" (the table's own: {own_theta:g})"),
        "clamp": f"{metadata.clamp_percent:g} %",
        "budget": f"{metadata.budget:g}" if metadata.budget != 1 else "",
        "unfiltered end": f"{metadata.unfiltered_end} tokens" if metadata.unfiltered_end else "",
        "calibrated on": f"{metadata.num_sequences} sequences, seed {metadata.seed}: {metadata.corpus}",
        "made by": f"{metadata.tool_version}, method {metadata.method!r}",
        "digest": table.digest(),
    }
    for name, value in facts.items():
        if value:
            grid.add_row(name, Text(value))
    return grid


def layer_table(table: ThresholdTable, lengths: list[int]) -> Table:
    """Layers by share of global channels and the median of these channels' thresholds, for prompt lengths in tokens."""
    title = "Layers (thresholds of dt: median of the global channels)"
    result = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    result.add_column("layer", justify="right")
    result.add_column("global channels", justify="right")
    for length in lengths:
        result.add_column(_column_name(table, length), justify="right")
    medians = threshold_medians(table)
    rows = [table.row_of(length) for length in lengths]
    for layer in sorted(table.layers):
        is_global = table.is_global(layer)
        found = [f"{medians[layer][row]:.2g}" if layer in medians else "-" for row in rows]
        cells = ["no filter" if row == 0 else cell for row, cell in zip(rows, found, strict=True)]
        result.add_row(str(layer), _share(int(is_global.sum()), len(is_global)), *cells)
    result.add_section()
    channels = sum(len(layer.retention) for layer in table.layers.values())
    result.add_row("all", _share(table.count_global(), channels), *[""] * len(lengths))
    return result


def threshold_medians(table: ThresholdTable) -> dict[int, np.ndarray]:
    """Medians of the global channels' thresholds, layer -> (rows,); layers without such channels are left out."""
    medians = {}
    for layer in sorted(table.layers):
        is_global = table.is_global(layer)
        if bool(is_global.any()):
            medians[layer] = np.median(table.layers[layer].dt_threshold[:, is_global].numpy(), axis=1)
    return medians


def measured_table(table: ThresholdTable, measured: Measurements) -> Table:
    """What the filter does to prompts of a text: tokens kept, and how far back the layers look."""
    result = Table(
        title=f"Measured on {measured.text}",
        title_justify="left",
        caption="kept: share of a prompt's tokens that enter a global channel, mean of the layers.\n"
        "mean distance: tokens that the last token looks back, mean of layers and channels.",
        caption_justify="left",
        box=SIMPLE_HEAD,
    )
    for name in ("prompt", "kept", "mean distance, plain", "filtered"):
        result.add_column(name, justify="right")
    for length, plain in measured.plain.items():
        kept = list(kept_by_layer(table, measured, length).values())
        filtered = measured.filtered.get(length)
        result.add_row(
            str(length),
            "all" if filtered is None else f"{np.mean(kept):.1%}" if kept else "no global channel",
            _distance(plain),
            "" if filtered is None else _distance(filtered),
        )
    return result


def kept_by_layer(table: ThresholdTable, measured: Measurements, length: int) -> dict[int, float]:
    """Share of the tokens of a prompt that the global channels keep, layer -> mean; layers without any are left out."""
    shares: dict[int, float] = {}
    measurement = measured.filtered.get(length) or measured.plain[length]
    for layer, content in measurement.items():
        is_global = table.is_global(layer).numpy()
        if is_global.any():
            shares[layer] = float(content.kept[is_global].mean())
    return shares


def _distance(measurement: Measurement) -> str:
    return f"{np.mean([layer.distance for layer in measurement.values()]):.0f}"


def _column_name(table: ThresholdTable, length: int) -> str:
    row_length = int(table.row_lengths[table.row_of(length)])
    return f"S = {length}" if row_length == length else f"S = {length} (row {row_length})"


def _share(count: int, channels: int) -> str:
    return f"{count}/{channels} {count / channels:4.0%}"
