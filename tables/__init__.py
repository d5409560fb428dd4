"""Threshold tables: what they hold, how they are saved, and how they are calibrated.

Knows neither vLLM nor the kernels: torch, numpy, safetensors, blake3 and the standard library only.
"""

from .calibrate import LayerCalibration, merge_channel_shards
from .channel_budgets import layer_budgets, read_channel_budgets
from .closed_loop import budget_thresholds, combine_thresholds, interpolate_thresholds, measured_lengths
from .metadata import (
    CLOSED_LOOP,
    COMBINE,
    DEFAULT_COMBINE,
    DEFAULT_MIN_RETENTION,
    FORMAT_VERSION,
    MEAN,
    METHODS,
    PAPER,
    UNCLAMPED,
    ClosedLoop,
    TableMetadata,
    check_combine,
)
from .ranges import check_range
from .row_lengths import default_row_lengths
from .storage import (
    TableError,
    is_table_file,
    load_table,
    read_metadata,
    save_bytes,
    save_table,
    table_from_bytes,
    table_to_bytes,
)
from .table import NO_FILTER, LayerThresholds, ThresholdTable
from .unfiltered import filtered_channels, leave_unfiltered

__all__ = [
    "CLOSED_LOOP",
    "COMBINE",
    "DEFAULT_COMBINE",
    "DEFAULT_MIN_RETENTION",
    "FORMAT_VERSION",
    "MEAN",
    "METHODS",
    "NO_FILTER",
    "PAPER",
    "UNCLAMPED",
    "ClosedLoop",
    "LayerCalibration",
    "LayerThresholds",
    "TableError",
    "TableMetadata",
    "ThresholdTable",
    "budget_thresholds",
    "check_combine",
    "check_range",
    "combine_thresholds",
    "default_row_lengths",
    "filtered_channels",
    "interpolate_thresholds",
    "is_table_file",
    "layer_budgets",
    "leave_unfiltered",
    "load_table",
    "measured_lengths",
    "merge_channel_shards",
    "read_channel_budgets",
    "read_metadata",
    "save_bytes",
    "save_table",
    "table_from_bytes",
    "table_to_bytes",
]
