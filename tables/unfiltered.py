"""Channels that a table leaves unfiltered though they are global."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
import torch

from .table import NO_FILTER, LayerThresholds, ThresholdTable


def leave_unfiltered(table: ThresholdTable, names: Iterable[str]) -> ThresholdTable:
    """Returns a table in which some channels have no thresholds, and whose metadata say so.

    Args:
        table: stays as it is.
        names: "LAYER" for all channels of a layer, "LAYER.CHANNEL" for one (a channel: of d_inner in Mamba-1, a head in
            Mamba-2).

    Raises:
        ValueError: a name of another form, or of a layer or channel that the table has not.
    """
    names = sorted({*table.metadata.unfiltered, *names}, key=read_place)
    layers = dict(table.layers)
    for layer, channels in _channels_of(names, table.layers).items():
        thresholds = layers[layer].dt_threshold.numpy().copy()  # NumPy: see table.py
        thresholds[:, channels] = NO_FILTER
        layers[layer] = LayerThresholds(layers[layer].retention, torch.from_numpy(thresholds))
    return replace(table, metadata=replace(table.metadata, unfiltered=tuple(names)), layers=layers)


def filtered_channels(table: ThresholdTable, min_retention: float | None = None) -> dict[int, list[int]]:
    """Returns the channels that a table filters.

    Args:
        table: the table.
        min_retention: theta; None takes the table's own.

    Returns:
        Layer -> its global channels, ascending; layers without any are left out.

    Raises:
        ValueError: theta is outside [0, 1].
    """
    found = {layer: table.is_global(layer, min_retention).numpy() for layer in sorted(table.layers)}
    return {layer: np.flatnonzero(is_global).tolist() for layer, is_global in found.items() if is_global.any()}


def _channels_of(names: Iterable[str], layers: Mapping[int, LayerThresholds]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for name in names:
        layer, *rest = read_place(name)
        count = len(layers[layer].retention) if layer in layers else 0
        channels = rest or list(range(count))
        if not channels or max(channels) >= count:
            raise ValueError(f"unfiltered: the table of this model has no {name!r}; its layers are {sorted(layers)}")
        found.setdefault(layer, []).extend(channels)
    return found


def read_place(name: str) -> tuple[int, ...]:
    """Reads "LAYER" or "LAYER.CHANNEL" as (layer,) or (layer, channel); raises ValueError for another form."""
    parts = name.split(".")
    if not (1 <= len(parts) <= 2 and all(part.isascii() and part.isdigit() for part in parts)):
        raise ValueError(f"unfiltered: must be LAYER or LAYER.CHANNEL, got {name!r}")
    return tuple(map(int, parts))
