"""The threshold table of one model: which prompt length takes which row, which row filters which token."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor

from .metadata import TableMetadata
from .ranges import check_range
from .row_lengths import check_row_lengths

# A threshold that no dt reaches (dt >= 0): nothing is filtered.
NO_FILTER = -1.0


@dataclass(frozen=True, eq=False)
class LayerThresholds:
    """What calibration found for one layer. Both tensors lie in host memory and must not be changed afterwards.

    Attributes:
        retention: (channels,) float64 in [0, 1], mean over the sequences of exp(A * sum_t dt_t).
        dt_threshold: (rows, channels) float32, g(S) in units of dt; -1.0 where nothing is filtered.

    Raises:
        ValueError: another dtype, device or shape, a NaN, or a value outside these ranges.
    """

    retention: Tensor
    dt_threshold: Tensor

    def __post_init__(self) -> None:
        for name, ndim, dtype in (("retention", 1, torch.float64), ("dt_threshold", 2, torch.float32)):
            tensor: Tensor = getattr(self, name)
            if tensor.ndim != ndim or tensor.dtype != dtype or tensor.device.type != "cpu":
                raise ValueError(
                    f"LayerThresholds.{name} must be a {ndim}-dimensional {dtype} tensor in host memory, got shape "
                    f"{tuple(tensor.shape)}, {tensor.dtype}, {tensor.device}; convert it with .to('cpu', {dtype})"
                )
        rows, channels = self.dt_threshold.shape
        if channels != self.retention.shape[0] or rows == 0 or channels == 0:
            raise ValueError(
                "LayerThresholds.dt_threshold must be (rows, channels) with at least one row and the channels of "
                f"retention, got {(rows, channels)} with retention {tuple(self.retention.shape)}; "
                "take both from one calibration"
            )
        # Comparisons with NaN are false, so these refuse it too.
        if not bool(((self.retention >= 0) & (self.retention <= 1)).all()):
            raise ValueError(
                "LayerThresholds.retention must lie in [0, 1], got NaN or a value outside; calibrate the model again"
            )
        # NumPy, which starts no threads: vLLM forks its engine core from the process that has loaded the table, and a
        # torch operation on several threads hangs in the fork of a process that has run one before.
        # min and max hand a NaN on. A table of mamba-1.4b has 38 million thresholds: few passes over them.
        values = self.dt_threshold.numpy()
        negative = values[values < 0]
        if not math.isfinite(values.min() + values.max()) or bool((negative != NO_FILTER).any()):
            raise ValueError(
                f"LayerThresholds.dt_threshold must be finite and >= 0, or {NO_FILTER} for no filter, got NaN or a "
                "value outside; calibrate the model again"
            )


@dataclass(frozen=True, eq=False)
class ThresholdTable:
    """All thresholds of one model.

    Attributes:
        metadata: where the table comes from.
        row_lengths: (rows,) int64, ascending prompt lengths in tokens; row 0 is train_length and means "no filter".
        layers: layer index -> thresholds of its channels; row 0 of each is -1.0.

    Raises:
        ValueError: rows out of order, a row 0 that filters, layers whose rows differ from row_lengths, no layer.
    """

    metadata: TableMetadata
    row_lengths: np.ndarray
    layers: Mapping[int, LayerThresholds]

    def __post_init__(self) -> None:
        lengths = check_row_lengths(self.row_lengths, self.metadata.train_length, "ThresholdTable")
        object.__setattr__(self, "row_lengths", lengths)
        if not self.layers:
            raise ValueError("ThresholdTable.layers must hold at least one layer, got none; calibrate the model again")
        for layer, thresholds in self.layers.items():
            if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
                raise ValueError(f"ThresholdTable.layers: keys must be indices >= 0, got {layer!r}; pass integers")
            if thresholds.dt_threshold.shape[0] != len(lengths):
                raise ValueError(
                    f"ThresholdTable.layers[{layer}].dt_threshold must have one row for each of the {len(lengths)} "
                    f"row_lengths, got {thresholds.dt_threshold.shape[0]}; calibrate with these row_lengths"
                )
            if not bool((thresholds.dt_threshold[0] == NO_FILTER).all()):
                raise ValueError(
                    f"ThresholdTable.layers[{layer}].dt_threshold: row 0 means no filter and must be {NO_FILTER}, "
                    "got another value; calibrate the model again"
                )

    def row_of(self, prompt_length: int) -> int:
        """Returns the row of a prompt of S tokens: the nearest of row_lengths, ties to the shorter, 0 for S <= L."""
        return int(np.searchsorted(self._between_rows, 2 * prompt_length, side="left"))

    def rows_of(self, prompt_lengths: np.ndarray) -> np.ndarray:
        """Returns the rows of many prompts.

        Args:
            prompt_lengths: integers of any shape, in tokens.

        Returns:
            int32 of the same shape.
        """
        doubled = 2 * prompt_lengths.astype(np.int64)
        return np.searchsorted(self._between_rows, doubled, side="left").astype(np.int32)

    def is_global(self, layer: int, min_retention: float | None = None) -> Tensor:
        """Returns which channels of a layer are global, (channels,) bool: retention > min_retention.

        Args:
            layer: layer index.
            min_retention: theta; None takes the table's own.

        Raises:
            ValueError: the table has no such layer, or theta is outside [0, 1].
        """
        is_global = self._layer(layer).retention.numpy() > self._theta(min_retention)  # NumPy: see LayerThresholds
        return torch.from_numpy(is_global)

    def count_global(self, min_retention: float | None = None) -> int:
        """Returns how many channels of all layers `is_global` names.

        Args:
            min_retention: theta; None takes the table's own.

        Raises:
            ValueError: theta is outside [0, 1].
        """
        return sum(int(self.is_global(layer, min_retention).sum()) for layer in self.layers)

    def thresholds(self, layer: int, min_retention: float | None = None) -> Tensor:
        """Returns the thresholds that a mixer compares with: a token of dt <= threshold is filtered.

        Args:
            layer: layer index.
            min_retention: theta; None takes the table's own.

        Returns:
            A new (rows, channels) float32 tensor, -1.0 in row 0 and in every row of a local channel.

        Raises:
            ValueError: the table has no such layer, or theta is outside [0, 1].
        """
        is_global = self.is_global(layer, min_retention).numpy()
        # NumPy for the reason given in LayerThresholds.
        values = np.where(is_global, self._layer(layer).dt_threshold.numpy(), np.float32(NO_FILTER))
        return torch.from_numpy(values)

    def unfiltered_end(self, unfiltered_end: int | None = None) -> int:
        """Returns how many of a prompt's last tokens are not filtered.

        Args:
            unfiltered_end: what a user asks for; None takes the table's own.

        Raises:
            ValueError: below 0.
        """
        if unfiltered_end is None:
            return self.metadata.unfiltered_end
        check_range("unfiltered_end", unfiltered_end, "ThresholdTable")
        return unfiltered_end

    def digest(self, min_retention: float | None = None, unfiltered_end: int | None = None) -> str:
        """Returns 32 hexadecimal digits that stand for all of the table that changes a model's output.

        Covers row_lengths, layer indices, retention, thresholds, theta and the unfiltered end; not model_id, corpus and
        the like.

        Args:
            min_retention: theta; None takes the table's own.
            unfiltered_end: in tokens; None takes the table's own.

        Raises:
            ValueError: theta is outside [0, 1], or unfiltered_end below 0.
        """
        theta, end = self._theta(min_retention), self.unfiltered_end(unfiltered_end)
        return blake3(self._content + repr((theta, end)).encode()).hexdigest(length=16)

    @cached_property
    def _between_rows(self) -> np.ndarray:
        """(rows - 1,) twice the midpoints of neighbouring rows: integers, so that ties are exact."""
        sums: np.ndarray = self.row_lengths[:-1] + self.row_lengths[1:]
        return sums

    @cached_property
    def _content(self) -> bytes:
        content = blake3(self.row_lengths.tobytes())
        for layer, thresholds in sorted(self.layers.items()):
            content.update(repr((layer, tuple(thresholds.dt_threshold.shape))).encode())
            content.update(thresholds.retention.numpy().tobytes())
            content.update(thresholds.dt_threshold.numpy().tobytes())
        return content.digest()

    def _layer(self, layer: int) -> LayerThresholds:
        if layer not in self.layers:
            raise ValueError(
                f"the table of {self.metadata.model_id!r} holds layers {sorted(self.layers)}, got layer {layer}; "
                f"make a table of this model with `longmamba calibrate {self.metadata.model_id}`"
            )
        return self.layers[layer]

    def _theta(self, min_retention: float | None) -> float:
        if min_retention is None:
            return self.metadata.min_retention
        check_range("min_retention", min_retention, "ThresholdTable")
        return float(min_retention)
