"""Calibration written a second time from the text of the method, in numpy float64, sharing no code with tables/.

The text (LongMamba, arXiv 2504.16053, sections 3 and 4, as the project's design notes put it):

- Retention of a channel: exp(A * sum_t dt_t) over a calibration sequence of the training length L (Mamba-1: mean over
  d_state), averaged over the sequences. A channel of retention > min_retention is global.
- g(S) of a channel: clamp the dt's of a sequence at the value that the top C % exceed, sort them descending, stretch
  the sorted curve linearly from L to S points, sum it up; g(S) is the value where the running sum first exceeds the
  clamped sum over the L tokens. Averaged over the sequences.

Three steps are other ones in the method "unclamped" (docs/calibration.md): nothing is clamped, C = 0; a channel's
average over the sequences is taken of the smaller of each threshold and twice their median; and half of a prompt's sum
is for the last L / 2 tokens, which are not filtered, so that the running sum exceeds half of the sum over L tokens.

The text leaves two things open, which are read here as numpy reads them: "the value that the top C % exceed" is
np.percentile(dt, 100 - C), which interpolates between neighbouring dt's; a curve "stretched linearly" keeps both its
ends, np.linspace(0, L - 1, S). The authors' code (load_align_target.py of GATECH-EIC/LongMamba) clamps at the smallest
of the int(L C) largest dt's and stretches with half a point cut off at each end.
"""

import numpy as np


def retention(A: np.ndarray, sequences: list[np.ndarray]) -> np.ndarray:
    """Mean over the sequences of exp(A * sum_t dt_t), (channels,).

    Args:
        A: (channels,) for Mamba-2 or (channels, d_state) for Mamba-1, negative.
        sequences: dt's of whole sequences, each (L, channels).
    """
    kept = []
    for dt in sequences:
        total = dt.astype(np.float64).sum(axis=0)
        rates = A.astype(np.float64).reshape(len(total), -1)
        kept.append(np.exp(rates * total[:, None]).mean(axis=1))
    return np.mean(kept, axis=0)


def dt_threshold(
    sequences: list[np.ndarray],
    prompt_length: int,
    clamp_percent: float,
    clips_outliers: bool = False,
    budget: float = 1.0,
) -> np.ndarray:
    """g(prompt_length) of every channel, (channels,); prompt_length > L. `budget`: share of the sum over L tokens."""
    per_sequence = [
        [_threshold_of(channel, prompt_length, clamp_percent, budget) for channel in dt.astype(np.float64).T]
        for dt in sequences
    ]
    if clips_outliers:
        per_sequence = np.minimum(per_sequence, 2 * np.median(per_sequence, axis=0))
    return np.mean(per_sequence, axis=0)


def _threshold_of(dt: np.ndarray, prompt_length: int, clamp_percent: float, budget: float) -> float:
    clamped = np.minimum(dt, np.percentile(dt, 100 - clamp_percent))
    target = budget * clamped.sum()
    descending = np.sort(clamped)[::-1]
    stretched = np.interp(np.linspace(0, len(dt) - 1, prompt_length), np.arange(len(dt)), descending)
    running = 0.0
    for value in stretched:
        running += value
        if running > target:
            return float(value)
    raise AssertionError(f"{prompt_length} points never exceed the sum over {len(dt)}")
