"""Thresholds in about a byte or less each: logarithm, differences along the rows, byte planes, zlib."""

import math
import zlib

import numpy as np

from .table import NO_FILTER

# Step of ln(g): a relative error of at most 5e-4.
LOG_STEP = 1e-3
SMALLEST = 1e-30
_ZLIB_LEVEL = 6
# Codes fit 17 bits (1e-30 to the largest float32 is 157,800 steps: 18), zigzag adds one.
_MAX_PLANES = 3
_LARGEST_CODE = 1 + round((math.log(float(np.finfo(np.float32).max)) - math.log(SMALLEST)) / LOG_STEP)


def pack_thresholds(dt_threshold: np.ndarray) -> np.ndarray:
    """Returns the thresholds of one layer, packed.

    Args:
        dt_threshold: (rows, channels) float32, row 0 without filter (it is not stored), -1.0 for no filter;
            values below 1e-30 become 1e-30.

    Returns:
        (bytes,) uint8.
    """
    values = dt_threshold[1:]
    logs = np.log(np.maximum(values, SMALLEST).astype(np.float64))
    codes = np.where(values == NO_FILTER, 0, 1 + np.rint((logs - math.log(SMALLEST)) / LOG_STEP)).astype(np.int32)
    deltas = np.diff(codes, axis=0, prepend=np.int32(0))
    zigzag = ((deltas << 1) ^ (deltas >> 31)).astype(np.uint32)
    planes = [((zigzag >> (8 * plane)) & 0xFF).astype(np.uint8) for plane in range(_MAX_PLANES)]
    return np.frombuffer(zlib.compress(np.stack(planes).tobytes(), _ZLIB_LEVEL), dtype=np.uint8)


def unpack_thresholds(packed: np.ndarray, rows: int, channels: int) -> np.ndarray:
    """Returns what `pack_thresholds` was given, to 5e-4 relative, as (rows, channels) float32.

    Raises:
        ValueError: the bytes are damaged, or not of this many rows and channels.
    """
    expected = _MAX_PLANES * (rows - 1) * channels
    stream = zlib.decompressobj()
    try:
        # One byte more than expected is enough to refuse a larger one.
        content = stream.decompress(packed.tobytes(), expected + 1)
    except zlib.error as error:
        raise ValueError(f"packed thresholds are damaged ({error})") from error
    if len(content) != expected or not stream.eof:
        raise ValueError(f"packed thresholds must unfold to {expected} bytes, got {len(content)} or more")
    planes = np.frombuffer(content, dtype=np.uint8).reshape(_MAX_PLANES, rows - 1, channels)
    zigzag = np.zeros((rows - 1, channels), dtype=np.int32)
    for plane in range(_MAX_PLANES):
        zigzag |= planes[plane].astype(np.int32) << (8 * plane)
    codes = np.cumsum((zigzag >> 1) ^ -(zigzag & 1), axis=0, dtype=np.int32)
    if codes.size and (codes.min() < 0 or codes.max() > _LARGEST_CODE):
        raise ValueError("packed thresholds hold a code out of range")
    decoded = np.exp(math.log(SMALLEST) + LOG_STEP * (np.arange(_LARGEST_CODE + 1) - 1))
    decoded = np.minimum(decoded, np.finfo(np.float32).max).astype(np.float32)
    decoded[0] = NO_FILTER
    dt_threshold = np.full((rows, channels), NO_FILTER, dtype=np.float32)
    dt_threshold[1:] = decoded[codes]
    return dt_threshold
