"""Threshold tables of a few numbers, for tests that need no model."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from vllm_longmamba.tables import LayerThresholds, TableMetadata, ThresholdTable, save_table

TRAIN_LENGTH = 8
ROW_LENGTHS = (8, 12, 16, 20)


def small_table(layers: tuple[int, ...] = (0, 1), channels: int = 3, **metadata: Any) -> ThresholdTable:
    """A table of a model trained on 8 tokens, with rows for prompts of 8 (no filter), 12, 16 and 20 tokens.

    Args:
        layers: layer indices.
        channels: channels of each layer.
        metadata: fields of `TableMetadata` to replace; a `train_length` moves all rows along.
    """
    content: dict[str, Any] = {
        "model_id": "org/model",
        "weights_fingerprint": "f" * 64,
        "train_length": TRAIN_LENGTH,
        "corpus": "a book",
        "clamp_percent": 5.0,
        "min_retention": 1e-2,
        "num_sequences": 5,
        "seed": 0,
        "tool_version": "test",
    }
    source = TableMetadata(**(content | metadata))
    thresholds = torch.arange(len(ROW_LENGTHS), dtype=torch.float32)[:, None].repeat(1, channels) / 10
    thresholds[0] = -1.0
    return ThresholdTable(
        metadata=source,
        row_lengths=np.array(ROW_LENGTHS) + source.train_length - TRAIN_LENGTH,
        layers={
            layer: LayerThresholds(torch.logspace(-6, 0, channels, dtype=torch.float64), thresholds) for layer in layers
        },
    )


def write_small_table(path: Path, **changes: Any) -> ThresholdTable:
    """Save a `small_table`; its folder is made where it is missing."""
    table = small_table(**changes)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_table(table, path)
    return table
