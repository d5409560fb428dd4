"""g(S) for many lengths S at once, without laying out S points.

The descending calibration curve has L knots. Stretched to S points, sample i stands at position i (L - 1) / (S - 1).
How many samples fall between two knots, and how far in, depends on S alone, so all channels share it: the sum over one
segment is a weighted sum of its two knots. Blocks of segments are summed by matrix products until the target is passed,
then segments, then single samples (closed form). Everything is float64; sample positions are exact integers.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

# Channels x rows of one chunk: what a CPU's cache holds, or what hides a GPU's launches.
_CHUNK_ELEMENTS_CPU = 1 << 15
_CHUNK_ELEMENTS_GPU = 1 << 21


@dataclass(frozen=True)
class _Segments:
    """Samples of each stretched curve between knots j and j + 1; segment L - 1 holds only the last sample.

    Segments are padded with empty ones to whole blocks.

    Attributes:
        block_size: segments in a block.
        count: (segments, rows) float64, samples in the segment.
        fraction_sum: (segments, rows) float64, sum of their fractions of the way to the next knot.
        first_fraction: (segments, rows) float64, fraction of the first one.
        step: (rows,) float64, distance between neighbouring samples, (L - 1) / (S - 1).
        block_weights: (blocks, block_size + 1, rows) float64, weight of each knot of a block in the block's sum.
    """

    block_size: int
    count: Tensor
    fraction_sum: Tensor
    first_fraction: Tensor
    step: Tensor
    block_weights: Tensor


@lru_cache(maxsize=2)
def _segments(train_length: int, lengths: tuple[int, ...], device: torch.device) -> _Segments:
    block_size = 1 << (train_length.bit_length() // 2)
    blocks = -(-train_length // block_size)
    # (1, rows) and (segments + 1, 1): int64 throughout, so that sample positions are exact.
    spans = torch.tensor(lengths, dtype=torch.int64).unsqueeze(0) - 1
    knots = torch.arange(train_length + 1, dtype=torch.int64).unsqueeze(1)
    last = train_length - 1
    first = (knots * spans + last - 1) // last
    first[train_length] = spans + 1
    count = first[1:] - first[:-1]
    start = knots[:-1] * spans
    index_sum = count * (first[:-1] + first[1:] - 1) // 2
    fraction_sum = (last * index_sum - count * start) / spans.double()
    first_fraction = (last * first[:-1] - start) / spans.double()

    def padded(values: Tensor) -> Tensor:
        full = torch.zeros(blocks * block_size, len(lengths), dtype=torch.float64)
        full[:train_length] = values
        return full

    count_padded, fraction_padded = padded(count.double()), padded(fraction_sum)
    weights = torch.zeros(blocks, block_size + 1, len(lengths), dtype=torch.float64)
    weights[:, :-1] += (count_padded - fraction_padded).view(blocks, block_size, -1)
    weights[:, 1:] += fraction_padded.view(blocks, block_size, -1)
    return _Segments(
        block_size=block_size,
        count=count_padded.to(device),
        fraction_sum=fraction_padded.to(device),
        first_fraction=padded(first_fraction).to(device),
        step=(last / spans.double()).squeeze(0).to(device),
        block_weights=weights.to(device),
    )


def crossing_values(curve: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Returns where each stretched curve's running sum first exceeds the sum over the curve itself.

    Args:
        curve: (channels, L) float64, each channel descending and >= 0, L at least 2.
        lengths: the S of each row, all above L.

    Returns:
        (channels, len(lengths)) float64: the sample at which the sum first exceeds; 0.0 where it never does (a curve of
        zeros). A sample that lifts the sum is above 0, so 0.0 marks nothing else.

    Source: arXiv 2504.16053, section 4.2.
    """
    channels, train_length = curve.shape
    values = torch.zeros(channels, len(lengths), dtype=torch.float64, device=curve.device)
    if not lengths:
        return values
    segments = _segments(train_length, lengths, curve.device)
    elements = _CHUNK_ELEMENTS_CPU if curve.device.type == "cpu" else _CHUNK_ELEMENTS_GPU
    chunk = max(1, elements // len(lengths))
    for begin in range(0, channels, chunk):
        values[begin : begin + chunk] = _crossing_values_of_chunk(curve[begin : begin + chunk], segments)
    return values


def _crossing_values_of_chunk(curve: Tensor, segments: _Segments) -> Tensor:
    channels, train_length = curve.shape
    num_segments, rows = segments.count.shape
    # Every knot needs a right neighbour; the weights of the appended ones are 0.
    knots = torch.zeros(channels, num_segments + 1, dtype=torch.float64, device=curve.device)
    knots[:, :train_length] = curve
    target = curve.sum(dim=1, keepdim=True)

    running = torch.zeros(channels, rows, dtype=torch.float64, device=curve.device)
    block = torch.zeros(channels, rows, dtype=torch.int64, device=curve.device)
    passed = torch.zeros(channels, rows, dtype=torch.bool, device=curve.device)
    for index, weights in enumerate(segments.block_weights):
        left = index * segments.block_size
        total = running + knots[:, left : left + segments.block_size + 1] @ weights
        passed |= total > target
        running = torch.where(passed, running, total)
        block += ~passed
        if bool(passed.all()):
            break

    # Channels that never pass stay in the last segment and are zeroed at the end.
    segment = block.clamp_(max=len(segments.block_weights) - 1) * segments.block_size
    inside = torch.zeros_like(passed)
    for _ in range(segments.block_size - 1):
        fraction_sum = segments.fraction_sum.gather(0, segment)
        total = running + (segments.count.gather(0, segment) - fraction_sum) * knots.gather(1, segment)
        total += fraction_sum * knots.gather(1, segment + 1)
        inside |= total > target
        running = torch.where(inside, running, total)
        segment += ~inside
        if bool(inside.all()):
            break

    height = knots.gather(1, segment)
    slope = knots.gather(1, segment + 1) - height
    first_fraction = segments.first_fraction.gather(0, segment)
    residual = target - running
    # Smallest m in (below, reached] whose first m samples of the segment exceed the residual.
    below = torch.zeros_like(height)
    reached = segments.count.gather(0, segment)
    while bool((reached - below > 1).any()):
        middle = torch.floor((below + reached) / 2)
        total = middle * height + slope * (middle * first_fraction + segments.step * middle * (middle - 1) / 2)
        exceeds = total > residual
        open_ = reached - below > 1
        reached = torch.where(open_ & exceeds, middle, reached)
        below = torch.where(open_ & ~exceeds, middle, below)
    sample = height + slope * (first_fraction + segments.step * (reached - 1))
    return torch.where(passed, sample, 0.0)
