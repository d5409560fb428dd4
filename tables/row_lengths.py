"""The prompt lengths that have a row of their own."""

import numpy as np

from .ranges import MOST_ROWS, MOST_TOKENS, check_range


def default_row_lengths(train_length: int, max_length: int) -> np.ndarray:
    """Returns the prompt lengths that get a row of their own, (rows,) int64.

    Row 0 is train_length. Then follow the multiples of min(1000, train_length // 2) above it, the last being the first
    that reaches max_length: the paper's resolution, finer where the training length is short.

    Args:
        train_length: L in tokens, at least 2.
        max_length: longest prompt to be served, in tokens.

    Raises:
        ValueError: train_length below 2, max_length below 1, or more than MOST_ROWS rows.
    """
    check_range("train_length", train_length, "default_row_lengths")
    if max_length < 1:
        raise ValueError(
            f"default_row_lengths: max_length must be at least 1 token, got {max_length}; pass the longest prompt"
        )
    row_step = min(1000, train_length // 2)
    first = train_length // row_step + 1
    last = max(first, -(-max_length // row_step))
    if last - first + 2 > MOST_ROWS:
        raise ValueError(
            f"default_row_lengths: a table must have at most {MOST_ROWS} rows, got a row every {row_step} tokens (half "
            f"of the training length of {train_length}, at most 1000) up to a max_length of {max_length}; check the "
            "training length, or take shorter prompts (--max-model-len)"
        )
    return np.array([train_length, *range(first * row_step, last * row_step + 1, row_step)], dtype=np.int64)


def check_row_lengths(row_lengths: np.ndarray, train_length: int, place: str) -> np.ndarray:
    """Returns row_lengths as a new read-only (rows,) int64 array.

    Args:
        row_lengths: (rows,) integers, in tokens.
        train_length: L in tokens, which row 0 must be.
        place: names the caller in messages.

    Raises:
        ValueError: not (rows,) integers, a first one other than train_length, a length that does not ascend, or one
            above MOST_TOKENS.
    """
    lengths = np.asarray(row_lengths)
    if lengths.ndim != 1 or lengths.size == 0 or not np.issubdtype(lengths.dtype, np.integer):
        raise ValueError(
            f"{place}.row_lengths must be (rows,) integers with at least one row, got shape {lengths.shape}, "
            f"{lengths.dtype}; take them from default_row_lengths"
        )
    # Without this bound the differences and midpoints of int64 lengths would overflow.
    if int(lengths.min()) < 0 or int(lengths.max()) > MOST_TOKENS:
        raise ValueError(
            f"{place}.row_lengths must be at most {MOST_TOKENS} tokens, got {lengths.min()} to {lengths.max()}; take "
            "them from default_row_lengths"
        )
    lengths = lengths.astype(np.int64)
    if lengths[0] != train_length or not bool((np.diff(lengths) > 0).all()):
        raise ValueError(
            f"{place}.row_lengths must begin with train_length {train_length} and ascend, got "
            f"{lengths[:4].tolist()}... up to {lengths[-1]}; take them from default_row_lengths"
        )
    lengths.flags.writeable = False
    return lengths
