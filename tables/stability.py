"""How far tables of one model, calibrated on different samples of text, agree (arXiv 2504.16053, Table 4)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .table import ThresholdTable


@dataclass(frozen=True, eq=False)
class LayerStability:
    """Mean and standard deviation of one layer's numbers over the tables. Arrays are float64, deviations of samples.

    Attributes:
        global_channels: (tables,) int64, how many channels are global in each table.
        ever_global: (channels,) bool, global in one table at least: the channels whose thresholds are used.
        always_global: (channels,) bool, global in every table.
        retention_mean, retention_std: (channels,).
        threshold_mean, threshold_std: (rows, channels), row 0 ("no filter") included.
    """

    global_channels: np.ndarray
    ever_global: np.ndarray
    always_global: np.ndarray
    retention_mean: np.ndarray
    retention_std: np.ndarray
    threshold_mean: np.ndarray
    threshold_std: np.ndarray

    @property
    def relative_std(self) -> np.ndarray:
        """(rows - 1, global channels) standard deviation of each threshold in use, in units of its mean."""
        mean = self.threshold_mean[1:, self.ever_global]
        std = self.threshold_std[1:, self.ever_global]
        relative: np.ndarray = np.divide(std, mean, out=np.zeros_like(std), where=mean > 0)
        return relative

    @property
    def undecided(self) -> int:
        """Channels that are global in some tables and local in others."""
        return int((self.ever_global & ~self.always_global).sum())


def table_stability(tables: Sequence[ThresholdTable], min_retention: float | None = None) -> dict[int, LayerStability]:
    """Compares tables layer by layer.

    Args:
        tables: two or more tables of one model, with the same rows.
        min_retention: retention above which a channel is global; None takes each table's own.

    Returns:
        Layer index -> its numbers.

    Raises:
        ValueError: fewer than two tables, or tables with other layers or rows than the first.
    """
    if len(tables) < 2:
        raise ValueError(f"table_stability: needs two tables or more, got {len(tables)}; calibrate more groups")
    first = tables[0]
    for table in tables:
        if set(table.layers) != set(first.layers) or not np.array_equal(table.row_lengths, first.row_lengths):
            raise ValueError(
                "table_stability: all tables must have the same layers and rows, got others; calibrate them alike"
            )
    return {layer: _layer_stability(tables, layer, min_retention) for layer in sorted(first.layers)}


def _layer_stability(tables: Sequence[ThresholdTable], layer: int, min_retention: float | None) -> LayerStability:
    is_global = torch.stack([table.is_global(layer, min_retention) for table in tables])
    retention = torch.stack([table.layers[layer].retention for table in tables])
    thresholds = torch.stack([table.layers[layer].dt_threshold.double() for table in tables])
    return LayerStability(
        global_channels=is_global.sum(dim=1).numpy(),
        ever_global=is_global.any(dim=0).numpy(),
        always_global=is_global.all(dim=0).numpy(),
        retention_mean=retention.mean(dim=0).numpy(),
        retention_std=retention.std(dim=0).numpy(),
        threshold_mean=thresholds.mean(dim=0).numpy(),
        threshold_std=thresholds.std(dim=0).numpy(),
    )
