"""Threshold tables: what they hold, how they are saved, and how they are calibrated.

Knows neither vLLM nor the kernels: torch, numpy, safetensors and the standard library only.
"""

from .calibrate import LayerCalibration, merge_channel_shards
from .metadata import FORMAT_VERSION, TableMetadata
from .row_lengths import default_row_lengths
from .stability import LayerStability, table_stability
from .storage import TableError, load_table, read_metadata, save_table, table_from_bytes, table_to_bytes
from .table import LayerThresholds, ThresholdTable

__all__ = [
    "FORMAT_VERSION",
    "LayerCalibration",
    "LayerStability",
    "LayerThresholds",
    "TableError",
    "TableMetadata",
    "ThresholdTable",
    "default_row_lengths",
    "load_table",
    "merge_channel_shards",
    "read_metadata",
    "save_table",
    "table_from_bytes",
    "table_stability",
    "table_to_bytes",
]
