"""Thresholds measured at the length where they act, with the filter already on in the layers below.

The paper stretches dt's of the training length to longer prompts (stretch.py); these come from text of that length.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .metadata import CLIPPED, MEAN, MEDIAN, check_combine
from .table import NO_FILTER

# Elements of dt that are looked at at a time: 256 MB of float32.
CHUNK_ELEMENTS = 1 << 26
# Of the largest finite float32.
_LARGEST_BITS = 0x7F7FFFFF


def budget_thresholds(dt: Tensor, budget: Tensor) -> Tensor:
    """Returns the smallest thresholds that keep one sequence within a budget; a token of dt > threshold is kept.

    In descending order, that is the dt with which the running sum first exceeds the budget.

    Args:
        dt: (tokens, channels) float32, softplus(dt_raw + dt_bias), on any device; the work is done there.
        budget: (channels,) float64 on that device, the sum of dt that a channel may keep, >= 0.

    Returns:
        (channels,) float32 on that device, each one of the dt's; -1.0 where the whole sequence stays within the budget.

    Raises:
        ValueError: other shapes or dtypes, no tokens, or dt negative, infinite or NaN.
    """
    if dt.ndim != 2 or dt.shape[0] == 0 or dt.dtype != torch.float32:
        raise ValueError(
            f"budget_thresholds: dt must be (tokens, channels) float32, got {tuple(dt.shape)} {dt.dtype}; "
            "pass one whole sequence"
        )
    if budget.shape != dt.shape[1:] or budget.dtype != torch.float64:
        raise ValueError(
            f"budget_thresholds: budget must be ({dt.shape[1]},) float64, got {tuple(budget.shape)} {budget.dtype}; "
            "pass one sum for each channel"
        )
    if not bool(((dt >= 0) & torch.isfinite(dt)).all()):
        raise ValueError(
            "budget_thresholds: dt must be finite and >= 0, got NaN, infinity or a negative value; "
            "pass softplus(dt_raw + dt_bias), and check the model's weights"
        )
    chunk = max(1, CHUNK_ELEMENTS // dt.shape[0])
    parts = [
        _bisect(dt[:, begin : begin + chunk], budget[begin : begin + chunk]) for begin in range(0, dt.shape[1], chunk)
    ]
    return torch.cat(parts) if parts else budget.float()


def _bisect(dt: Tensor, budget: Tensor) -> Tensor:
    everything = dt.sum(dim=0, dtype=torch.float64)
    # Numbers >= 0 are ordered as their bits are: 31 halvings find the threshold exactly, sooner than a sort would.
    exceeding = torch.zeros(budget.shape, dtype=torch.int32, device=dt.device)
    within = torch.full_like(exceeding, _LARGEST_BITS)
    for _ in range(31):
        middle = exceeding + torch.div(within - exceeding, 2, rounding_mode="floor")
        is_within = _kept_sum(dt, middle.view(torch.float32)) <= budget
        within = torch.where(is_within, middle, within)
        exceeding = torch.where(is_within, exceeding, middle)
    return torch.where(everything <= budget, NO_FILTER, within.view(torch.float32))


def _kept_sum(dt: Tensor, threshold: Tensor) -> Tensor:
    return torch.where(dt > threshold, dt, 0.0).sum(dim=0, dtype=torch.float64)


def combine_thresholds(thresholds: Tensor, combine: str) -> Tensor:
    """Returns one threshold for each channel from those of several sequences.

    Args:
        thresholds: (sequences, channels) floating point, -1.0 for no filter, which counts as 0.
        combine: "median" (the mean of the middle two, where the number of sequences is even), "min", "mean" or
            "clipped" (the mean, where no sequence counts as more than twice the median).

    Returns:
        (channels,) of the same dtype; -1.0 where the result is 0.

    Raises:
        ValueError: no sequence, or another name.
    """
    check_combine(combine, "combine_thresholds")
    if thresholds.ndim != 2 or thresholds.shape[0] == 0:
        raise ValueError(
            "combine_thresholds: thresholds must be (sequences, channels) with at least one sequence, got "
            f"{tuple(thresholds.shape)}; measure one first"
        )
    values = thresholds.clamp(min=0.0)
    if combine in (MEDIAN, CLIPPED):
        # What quantile(0.5) returns, which takes no more than 2^24 numbers.
        ordered, last = values.sort(dim=0).values, len(values) - 1
        median = torch.lerp(ordered[last // 2], ordered[last - last // 2], 0.5)
        combined = median if combine == MEDIAN else torch.minimum(values, 2 * median).mean(dim=0)
    else:
        combined = values.mean(dim=0) if combine == MEAN else values.amin(dim=0)
    return torch.where(combined > 0, combined, NO_FILTER)


def measured_lengths(row_lengths: np.ndarray | Sequence[int], longest: int | None = None) -> list[int]:
    """Returns the prompt lengths to measure at: from the first row that filters, doubled up to the last one.

    Args:
        row_lengths: (rows,) integers, at least two; see `default_row_lengths`.
        longest: no length above this one, if given; the thresholds of longer rows are extrapolated.

    Raises:
        ValueError: longest is shorter than the first row that filters.
    """
    first, last = int(row_lengths[1]), int(row_lengths[-1])
    if longest is not None and longest < first:
        raise ValueError(
            f"measured_lengths: the longest length must reach the first row that filters, {first} tokens, got {longest}"
        )
    last = last if longest is None else min(last, longest)
    lengths = [first]
    while 2 * lengths[-1] < last:
        lengths.append(2 * lengths[-1])
    return lengths if last == first else [*lengths, last]


def interpolate_thresholds(
    lengths: Sequence[int], thresholds: Tensor, row_lengths: np.ndarray | Sequence[int]
) -> Tensor:
    """Returns the thresholds of every row: between two lengths, ln g is linear in ln S.

    Where one of two lengths has no threshold, g itself is linear, from or to 0. Rows beyond the last length go on as
    between the last two, but never below the last one.

    Args:
        lengths: ascending, in tokens, the first no longer than the first row that filters; see `measured_lengths`.
        thresholds: (lengths, channels) in host memory, -1.0 for no filter.
        row_lengths: (rows,) integers, ascending; row 0 means no filter.

    Returns:
        (rows, channels) float32, -1.0 for no filter, and in row 0.

    Raises:
        ValueError: lengths out of order, of another number than the thresholds, or beginning too late.
    """
    rows = [int(length) for length in row_lengths]
    if list(lengths) != sorted(set(lengths)) or thresholds.shape[0] != len(lengths) or lengths[0] > rows[1]:
        raise ValueError(
            f"interpolate_thresholds: lengths must ascend, one for each of {thresholds.shape[0]} thresholds, from the "
            f"first row that filters, {rows[1]}, got {list(lengths)}; take them from measured_lengths"
        )
    result = torch.full((len(rows), thresholds.shape[1]), NO_FILTER, dtype=torch.float32)
    values = thresholds.double().clamp(min=0.0)
    if len(lengths) == 1:
        lengths, values = [lengths[0], 2 * lengths[0]], values.repeat(2, 1)
    for row, length in enumerate(rows[1:], start=1):
        right = min(max(int(np.searchsorted(lengths, length)), 1), len(lengths) - 1)
        span = np.log(lengths[right]) - np.log(lengths[right - 1])
        share = float((np.log(length) - np.log(lengths[right - 1])) / span)
        value = _between(values[right - 1], values[right], share)
        result[row] = torch.where(value > 0, value, NO_FILTER).float()
    return result


def _between(low: Tensor, high: Tensor, share: float) -> Tensor:
    straight = torch.lerp(low, high, min(share, 1.0))
    curved = low * (high / low) ** share
    value = torch.where((low > 0) & (high > 0), curved, straight)
    return value if share <= 1 else torch.maximum(value, high)
