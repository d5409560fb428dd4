"""From the dt's of calibration sequences to the thresholds of one layer (arXiv 2504.16053, section 4)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from .metadata import METHODS, PAPER, UNCLAMPED
from .ranges import check_range
from .row_lengths import check_row_lengths
from .stretch import crossing_values
from .table import NO_FILTER, LayerThresholds

# Elements of dt that are sorted at a time: 64 MB of float64.
_SORT_ELEMENTS = 1 << 23


class LayerCalibration:
    """Gathers the calibration sequences of one layer, in host memory.

    Args:
        A: (channels,) for Mamba-2 or (channels, d_state) for Mamba-1, negative, any float dtype and device.
        train_length: L in tokens.
        row_lengths: (rows,) integers, ascending from train_length; see `default_row_lengths`.
        clamp_percent: C, per cent of the dt's above the clamp, 0 <= C < 100.
        method: "paper" takes the mean of the sequences' thresholds; "unclamped" their clipped mean, in which none
            counts as more than twice their median: without a clamp a threshold hangs on the few largest dt's.
        budget: what a channel may keep, as a factor of its (clamped) sum over the training length; the paper's is 1.

    Raises:
        ValueError: another shape, A not negative, row_lengths, clamp_percent or budget out of range, another method.
    """

    def __init__(
        self,
        A: Tensor,
        train_length: int,
        row_lengths: np.ndarray | Sequence[int],
        clamp_percent: float,
        method: str = PAPER,
        budget: float = 1.0,
    ) -> None:
        if A.ndim not in (1, 2) or A.numel() == 0 or not bool(((A < 0) & torch.isfinite(A)).all()):
            raise ValueError(
                "LayerCalibration: A must be (channels,) or (channels, d_state), negative and finite, got shape "
                f"{tuple(A.shape)}; pass A = -exp(A_log), not A_log"
            )
        check_range("train_length", train_length, "LayerCalibration")
        check_range("clamp_percent", clamp_percent, "LayerCalibration")
        check_range("budget", budget, "LayerCalibration")
        if method not in METHODS:
            raise ValueError(f"LayerCalibration: method must be one of {', '.join(METHODS)}, got {method!r}")
        lengths = check_row_lengths(np.asarray(row_lengths), train_length, "LayerCalibration")
        self.train_length = train_length
        self.clamp_percent = float(clamp_percent)
        self.method = method
        self.budget = float(budget)
        self.num_sequences = 0
        # (channels, d_state), d_state 1 for Mamba-2.
        self._A = A.detach().to("cpu", torch.float64).reshape(A.shape[0], -1)
        self._lengths: tuple[int, ...] = tuple(lengths[1:].tolist())
        self._retention_sum = torch.zeros(A.shape[0], dtype=torch.float64)
        # (rows - 1, channels) each: one running sum for the mean, one of every sequence for the clipped mean.
        self._threshold_sum = torch.zeros(len(self._lengths), A.shape[0], dtype=torch.float64)
        self._thresholds: list[Tensor] = []

    def add(self, dt: Tensor) -> None:
        """Adds one calibration sequence.

        Args:
            dt: (train_length, channels) float32, softplus(dt_raw + dt_bias), on any device; the work is done there.

        Raises:
            ValueError: another shape or dtype, or dt negative, infinite or NaN.
        """
        channels = self._retention_sum.shape[0]
        if dt.shape != (self.train_length, channels) or dt.dtype != torch.float32:
            raise ValueError(
                f"LayerCalibration.add: dt must be ({self.train_length}, {channels}) float32, got "
                f"{tuple(dt.shape)} {dt.dtype}; pass one whole sequence of train_length tokens"
            )
        if not bool(((dt >= 0) & torch.isfinite(dt)).all()):
            raise ValueError(
                "LayerCalibration.add: dt must be finite and >= 0, got NaN, infinity or a negative value; "
                "pass softplus(dt_raw + dt_bias), and check the model's weights"
            )
        dt = dt.detach()
        dt_sum = dt.sum(dim=0, dtype=torch.float64).cpu()
        self._retention_sum += torch.exp(self._A * dt_sum.unsqueeze(1)).mean(dim=1)
        found = torch.empty_like(self._threshold_sum)
        chunk = max(1, _SORT_ELEMENTS // self.train_length)
        with _one_thread():
            for begin in range(0, channels, chunk):
                # (chunk, train_length)
                ascending = dt[:, begin : begin + chunk].t().contiguous().sort(dim=1).values.double()
                curve = torch.minimum(ascending, _clamp_value(ascending, self.clamp_percent)).flip(1)
                found[:, begin : begin + chunk] = crossing_values(curve, self._lengths, self.budget).t().cpu()
        if self.method == UNCLAMPED:
            self._thresholds.append(found.float())
        else:
            self._threshold_sum += found
        self.num_sequences += 1

    def result(self) -> LayerThresholds:
        """Returns the mean retention and the thresholds; row 0 is -1.0, "no filter".

        A sequence whose running sum never exceeds the target (all dt zero) has nothing to filter. It counts as 0, the
        threshold that leaves every token with dt > 0 alone; where the sequences together come to 0, the row is -1.0.

        Raises:
            ValueError: no sequence was added.
        """
        if self.num_sequences == 0:
            raise ValueError(
                "LayerCalibration.result: at least one sequence must have been added, got none; call add first"
            )
        rows, channels = self._threshold_sum.shape
        thresholds = torch.full((rows + 1, channels), NO_FILTER, dtype=torch.float32)
        if self.method == UNCLAMPED:
            mean = _clipped_mean(torch.stack(self._thresholds))
        else:
            mean = self._threshold_sum / self.num_sequences
        thresholds[1:] = torch.where(mean > 0, mean, NO_FILTER)
        # exp of a tiny negative number may round to 1, and so may the mean of ones.
        retention = (self._retention_sum / self.num_sequences).clamp_(max=1.0)
        return LayerThresholds(retention=retention, dt_threshold=thresholds)


def _clipped_mean(values: Tensor) -> Tensor:
    """Returns the mean of the first dimension in which no value counts as more than twice their median."""
    # What quantile(0.5) returns, which takes no more than 2^24 numbers.
    ordered, last = values.sort(dim=0).values, len(values) - 1
    median = torch.lerp(ordered[last // 2], ordered[last - last // 2], 0.5)
    return torch.minimum(values, 2 * median).mean(dim=0)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Thousands of small steps: two threads save a third of the time, but cost 30 times as much on a busy core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _clamp_value(ascending: Tensor, clamp_percent: float) -> Tensor:
    """Returns the value that the top clamp_percent of each (channels, L) row exceed, (channels, 1), interpolated."""
    position = (1 - clamp_percent / 100) * (ascending.shape[1] - 1)
    below = int(position)
    above = min(below + 1, ascending.shape[1] - 1)
    return torch.lerp(ascending[:, below : below + 1], ascending[:, above : above + 1], position - below)


def merge_channel_shards(shards: list[LayerThresholds]) -> LayerThresholds:
    """Returns one layer from the channel shards of tensor-parallel ranks, concatenated in rank order.

    Args:
        shards: thresholds of each rank's channels, all with the same rows.

    Raises:
        ValueError: no shard, or shards with different numbers of rows.
    """
    rows = {shard.dt_threshold.shape[0] for shard in shards}
    if len(rows) != 1:
        raise ValueError(
            f"merge_channel_shards: needs at least one shard, all with the same rows, got {len(shards)} shards with "
            f"{sorted(rows)} rows; calibrate every rank with the same row_lengths"
        )
    return LayerThresholds(
        retention=torch.cat([shard.retention for shard in shards]),
        dt_threshold=torch.cat([shard.dt_threshold for shard in shards], dim=1),
    )
