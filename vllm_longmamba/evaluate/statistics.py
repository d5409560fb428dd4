"""Confidence intervals of 95 %, by scipy."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from scipy import stats

Floats = npt.NDArray[np.float64]

_RESAMPLES = 2000


def share_interval(scores: Sequence[float]) -> tuple[float, float]:
    """Wilson's interval of a mean of scores between 0 and 1.

    Where the scores do not add up to a whole number, the interval is as wide as those of the whole numbers around it:
    nothing between 0 and 1 varies more than 0 and 1 do.
    """
    total = sum(scores)
    # A sum of thirds may miss its whole number by rounding.
    fewest, most = math.floor(total + 1e-9), math.ceil(total - 1e-9)
    low = stats.binomtest(fewest, len(scores)).proportion_ci(method="wilson").low
    high = stats.binomtest(most, len(scores)).proportion_ci(method="wilson").high
    return float(low), float(high)


def ratio_interval(clusters: Mapping[str, Sequence[Sequence[float]]]) -> tuple[float, float]:
    """Bootstrap interval (percentiles) of a ratio of two sums.

    Samples of one cluster (windows of one book) resemble each other, so whole clusters are resampled. With one cluster
    only, its samples are: such an interval says nothing about other books.

    Args:
        clusters: for each cluster its samples, each (above, below): what is summed above and below the line.
    """
    parts = [np.sum(samples, axis=0) for samples in clusters.values()]
    if len(parts) == 1:
        [parts] = clusters.values()  # type: ignore[assignment]
    if len(parts) == 1:
        ratio = parts[0][0] / parts[0][1]
        return float(ratio), float(ratio)
    above, below = np.asarray(parts, dtype=np.float64).T

    def ratio_of(above: Floats, below: Floats, axis: int) -> Floats:
        return np.asarray(above.sum(axis) / below.sum(axis))

    return _percentiles((above, below), ratio_of, paired=True)


def average_interval(tasks: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Bootstrap interval (percentiles) of the mean of tasks' means, over the scores of each task."""
    # scipy refuses a single score, which would be drawn every time: twice it is the same.
    samples = tuple(np.repeat(scores, 2 if len(scores) == 1 else 1) for scores in tasks)

    def average_of(*samples: Floats, axis: int) -> Floats:
        return np.asarray(sum(sample.mean(axis) for sample in samples) / len(samples))

    return _percentiles(samples, average_of, paired=False)


def _percentiles(samples: tuple[Floats, ...], statistic: object, paired: bool) -> tuple[float, float]:
    result = stats.bootstrap(
        samples, statistic, paired=paired, vectorized=True, method="percentile", n_resamples=_RESAMPLES, rng=0
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)
