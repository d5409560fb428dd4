"""Threshold tables: what they hold, how they are saved, and how they are calibrated.

Knows neither vLLM nor the kernels: torch, numpy, safetensors, blake3 and the standard library only.
"""

from .calibrate import LayerCalibration, merge_channel_shards
from .metadata import (
    DEFAULT_MIN_RETENTION,
    FORMAT_VERSION,
    METHODS,
    PAPER,
    UNCLAMPED,
    TableMetadata,
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

__all__ = [
    "DEFAULT_MIN_RETENTION",
    "FORMAT_VERSION",
    "METHODS",
    "NO_FILTER",
    "PAPER",
    "UNCLAMPED",
    "LayerCalibration",
    "LayerThresholds",
    "TableError",
    "TableMetadata",
    "ThresholdTable",
    "check_range",
    "default_row_lengths",
    "is_table_file",
    "load_table",
    "merge_channel_shards",
    "read_metadata",
    "save_bytes",
    "save_table",
    "table_from_bytes",
    "table_to_bytes",
]
