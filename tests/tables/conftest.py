"""A small table, and its metadata, for the tests of this folder."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from vllm_longmamba.tables import LayerThresholds, TableMetadata, ThresholdTable


@pytest.fixture
def make_metadata() -> Callable[..., TableMetadata]:
    """Makes metadata of a model trained on 8 tokens; keyword arguments replace fields."""

    def make(**changes: Any) -> TableMetadata:
        content: dict[str, Any] = {
            "model_id": "org/model",
            "weights_fingerprint": "0123abcd",
            "train_length": 8,
            "corpus": "three books: Ærøskøbing's",
            "clamp_percent": 5.0,
            "min_retention": 1e-2,
            "num_sequences": 5,
            "seed": 7,
            "tool_version": "0.1.0",
        }
        return TableMetadata(**(content | changes))

    return make


@pytest.fixture
def make_table(make_metadata: Callable[..., TableMetadata]) -> Callable[..., ThresholdTable]:
    """Makes a table of random thresholds, the same for the same arguments."""

    def make(channels: int = 5, num_rows: int = 4, layers: tuple[int, ...] = (0, 3), **changes: Any) -> ThresholdTable:
        generator = torch.Generator().manual_seed(3)
        thresholds = {}
        for layer in layers:
            rows = torch.rand(num_rows, channels, generator=generator).sort(dim=0).values
            rows[0] = -1.0
            retention = torch.logspace(-6, 0, channels, dtype=torch.float64)
            thresholds[layer] = LayerThresholds(retention=retention, dt_threshold=rows)
        metadata = make_metadata(**changes)
        row_lengths = metadata.train_length + 4 * np.arange(num_rows)
        return ThresholdTable(metadata=metadata, row_lengths=row_lengths, layers=thresholds)

    return make
