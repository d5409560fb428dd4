"""Which channels are drawn."""

import pytest
import torch
from small_tables import ROW_LENGTHS, small_table

from vllm_longmamba.inspect.measure import choose_channels, parse_channel
from vllm_longmamba.tables import LayerThresholds, ThresholdTable


def table_of(*retentions: list[float], theta: float = 1e-2) -> ThresholdTable:
    """A table with these retentions, one list a layer."""
    table = small_table(min_retention=theta)
    layers = {}
    for layer, retention in enumerate(retentions):
        thresholds = torch.full((len(ROW_LENGTHS), len(retention)), 0.1)
        thresholds[0] = -1.0
        layers[layer] = LayerThresholds(torch.tensor(retention, dtype=torch.float64), thresholds)
    return ThresholdTable(table.metadata, table.row_lengths, layers)


def test_parse_channel() -> None:
    table = small_table(layers=(0, 3), channels=5)
    assert parse_channel("3:4", table) == (3, 4)
    for text, message in {
        "3": "must be LAYER:CHANNEL",
        "3:x": "must be LAYER:CHANNEL",
        "1:0": r"no layer 1; it has \[0, 3\]",
        "3:5": "layer 3 has the channels 0 to 4",
    }.items():
        with pytest.raises(ValueError, match=message):
            parse_channel(text, table)


def test_choose_channels() -> None:
    table = table_of([1e-9, 1e-4, 0.9, 0.2, 0.5], [0.3, 1e-9, 1e-9, 1e-9, 1e-9], [1e-9] * 5)
    # The middle one of the global channels of both layers that have some; the best local one of the first of them.
    assert choose_channels(table) == [(0, 4), (1, 0), (0, 1)]
    assert choose_channels(table_of([1e-9] * 5)) == [(0, 0)]
    assert choose_channels(table_of([0.5])) == [(0, 0)]
