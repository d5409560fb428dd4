"""Confidence intervals."""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_Z95 = 1.959963984540054
_RESAMPLES = 2000


def wilson_interval(share: float, trials: int) -> tuple[float, float]:
    """95 % confidence interval of a probability (Wilson's score interval).

    Args:
        share: mean of the trials' scores, each between 0 and 1. For scores that are neither 0 nor 1 the interval is
            too wide, never too narrow: nothing between 0 and 1 varies more than 0 and 1 do.
        trials: their number, at least 1.
    """
    z2 = _Z95**2 / trials
    centre = (share + z2 / 2) / (1 + z2)
    half = math.sqrt(z2 * (share * (1 - share) + z2 / 4)) / (1 + z2)
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap_interval(
    clusters: Mapping[str, Sequence[Sequence[float]]], statistic: Callable[[Floats], float], seed: int = 0
) -> tuple[float, float]:
    """95 % bootstrap interval (percentiles) of a statistic of all samples.

    Samples of one cluster (windows of one book) resemble each other, so whole clusters are resampled. With one cluster
    only, its samples are: such an interval says nothing about other books.

    Args:
        clusters: for each cluster its samples, tuples of numbers.
        statistic: of (samples, numbers), the samples of all drawn clusters together.
        seed: of the resampling.
    """
    parts = [np.asarray(samples, dtype=np.float64) for samples in clusters.values()]
    if len(parts) == 1:
        parts = [sample[None] for sample in parts[0]]
    rng = np.random.default_rng(seed)
    draws = rng.integers(len(parts), size=(_RESAMPLES, len(parts)))
    values = [statistic(np.concatenate([parts[index] for index in draw])) for draw in draws]
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
