"""The prompt lengths that have a row of their own."""

import numpy as np

from .metadata import check_train_length


def default_row_lengths(train_length: int, max_length: int) -> np.ndarray:
    """Returns the prompt lengths that get a row of their own, (rows,) int64.

    Row 0 is train_length. Then follow the multiples of min(1000, train_length // 2) above it, the last being the first
    that reaches max_length: the paper's resolution, finer where the training length is short.

    Args:
        train_length: L in tokens, at least 2.
        max_length: longest prompt to be served, in tokens.

    Raises:
        ValueError: train_length below 2, or max_length below 1.
    """
    check_train_length(train_length, "default_row_lengths")
    if max_length < 1:
        raise ValueError(
            f"default_row_lengths: max_length must be at least 1 token, got {max_length}; pass the longest prompt"
        )
    row_step = min(1000, train_length // 2)
    first = train_length // row_step + 1
    last = max(first, -(-max_length // row_step))
    return np.array([train_length, *range(first * row_step, last * row_step + 1, row_step)], dtype=np.int64)


def check_row_lengths(row_lengths: np.ndarray, train_length: int, place: str) -> np.ndarray:
    """Returns row_lengths as a new read-only int64 array; ValueError unless they ascend from train_length."""
    lengths = np.asarray(row_lengths)
    if lengths.ndim != 1 or lengths.size == 0 or not np.issubdtype(lengths.dtype, np.integer):
        raise ValueError(
            f"{place}.row_lengths must be (rows,) integers with at least one row, got shape {lengths.shape}, "
            f"{lengths.dtype}; take them from default_row_lengths"
        )
    lengths = lengths.astype(np.int64)
    if lengths[0] != train_length or not bool((np.diff(lengths) > 0).all()):
        raise ValueError(
            f"{place}.row_lengths must begin with train_length {train_length} and ascend, got "
            f"{lengths[:4].tolist()}... up to {lengths[-1]}; take them from default_row_lengths"
        )
    lengths.flags.writeable = False
    return lengths
