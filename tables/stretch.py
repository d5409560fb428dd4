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
_CHUNK_ELEMENTS_CPU = 1 << 12
_CHUNK_ELEMENTS_GPU = 1 << 17


@dataclass(frozen=True)
class _Segments:
    """Samples of each stretched curve between knots j and j + 1; segment L - 1 holds only the last sample.

    Segments are padded with empty ones to whole blocks.

    Attributes:
        block_size: segments in a block.
        count: (blocks, rows, block_size) float64, samples in the segment.
        fraction_sum: (blocks, rows, block_size) float64, sum of their fractions of the way to the next knot.
        first_fraction: (blocks, rows, block_size) float64, fraction of the first one.
        halvings: of the samples of the fullest segment, until one is left.
        step: (rows,) float64, distance between neighbouring samples, (L - 1) / (S - 1).
        block_weights: (blocks, block_size + 1, rows) float64, weight of each knot of a block in the block's sum.
    """

    block_size: int
    count: Tensor
    fraction_sum: Tensor
    first_fraction: Tensor
    halvings: int
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

    def in_blocks(values: Tensor) -> Tensor:
        full = torch.zeros(blocks * block_size, len(lengths), dtype=torch.float64)
        full[:train_length] = values
        return full.view(blocks, block_size, -1)

    count_in_blocks, fraction_in_blocks = in_blocks(count.double()), in_blocks(fraction_sum)
    weights = torch.zeros(blocks, block_size + 1, len(lengths), dtype=torch.float64)
    weights[:, :-1] += count_in_blocks - fraction_in_blocks
    weights[:, 1:] += fraction_in_blocks

    def by_row(values: Tensor) -> Tensor:
        return values.transpose(1, 2).contiguous().to(device)

    return _Segments(
        block_size=block_size,
        count=by_row(count_in_blocks),
        fraction_sum=by_row(fraction_in_blocks),
        first_fraction=by_row(in_blocks(first_fraction)),
        halvings=(int(count.max()) - 1).bit_length(),
        step=(last / spans.double()).squeeze(0).to(device),
        block_weights=weights.to(device),
    )


def crossing_values(curve: Tensor, lengths: tuple[int, ...], budget: float = 1.0) -> Tensor:
    """Returns where each stretched curve's running sum first exceeds its budget, a part of the curve's own sum.

    Args:
        curve: (channels, L) float64, each channel descending and >= 0, L at least 2.
        lengths: the S of each row, all above L.
        budget: which part, above 0; 1 in the paper.

    Returns:
        (channels, len(lengths)) float64: the sample at which the sum first exceeds; 0.0 where it never does (a curve of
        zeros, a large budget). A sample that lifts the sum is above 0, so 0.0 marks nothing else.

    Source: arXiv 2504.16053, section 4.2.
    """
    channels, train_length = curve.shape
    values = torch.zeros(channels, len(lengths), dtype=torch.float64, device=curve.device)
    target = budget * curve.sum(dim=1)
    if not lengths:
        return values
    segments = _segments(train_length, lengths, curve.device)
    elements = _CHUNK_ELEMENTS_CPU if curve.device.type == "cpu" else _CHUNK_ELEMENTS_GPU
    chunk = max(1, elements // len(lengths))
    for begin in range(0, channels, chunk):
        values[begin : begin + chunk] = _crossing_values_of_chunk(
            curve[begin : begin + chunk], target[begin : begin + chunk, None, None], segments
        )
    return values


def _crossing_values_of_chunk(curve: Tensor, target: Tensor, segments: _Segments) -> Tensor:
    """`crossing_values` by operations on whole tensors: on a GPU no step waits for what another has found."""
    channels, train_length = curve.shape
    blocks, rows, block_size = segments.count.shape
    # Every knot needs a right neighbour; the weights of the appended ones are 0.
    knots = torch.zeros(channels, blocks * block_size + 1, dtype=torch.float64, device=curve.device)
    knots[:, :train_length] = curve
    # (channels, blocks, block_size + 1): a block ends with the first knot of the next one.
    knots_of_blocks = knots.unfold(1, block_size + 1, block_size)

    # (channels, rows, blocks)
    totals = torch.bmm(knots_of_blocks.transpose(0, 1), segments.block_weights).permute(1, 2, 0)
    block, before = _crossed(totals.cumsum(-1), target)
    crosses = block < blocks
    # Curves that never cross stay in the last block and are zeroed at the end.
    block = block.clamp(max=blocks - 1)

    row = torch.arange(rows, device=curve.device)
    left = knots_of_blocks[torch.arange(channels, device=curve.device).unsqueeze(1), block]
    count, fraction_sum = segments.count[block, row], segments.fraction_sum[block, row]
    totals = (count - fraction_sum) * left[..., :-1] + fraction_sum * left[..., 1:]
    # The last segment is not asked: it is where the sum crosses if no other is, whatever the rounding.
    running = before.unsqueeze(-1) + totals[..., :-1].cumsum(-1)
    segment, before = _crossed(running, target, before)
    segment = segment.unsqueeze(-1)

    height = left.gather(-1, segment).squeeze(-1)
    slope = left.gather(-1, segment + 1).squeeze(-1) - height
    first_fraction = segments.first_fraction[block, row, segment.squeeze(-1)]
    residual = target.squeeze(-1) - before
    # Smallest m in (below, reached] whose first m samples of the segment exceed the residual.
    below = torch.zeros_like(height)
    reached = count.gather(-1, segment).squeeze(-1)
    for _ in range(segments.halvings):
        middle = torch.floor((below + reached) / 2)
        total = middle * height + slope * (middle * first_fraction + segments.step * middle * (middle - 1) / 2)
        exceeds = total > residual
        is_open = reached - below > 1
        reached = torch.where(is_open & exceeds, middle, reached)
        below = torch.where(is_open & ~exceeds, middle, below)
    sample = height + slope * (first_fraction + segments.step * (reached - 1))
    return torch.where(crosses, sample, 0.0)


def _crossed(running: Tensor, target: Tensor, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """How many running sums of the last dimension do not exceed the target, and the last of these.

    Where there is none, `before`, or 0.
    """
    below = (running <= target).sum(-1)
    last = running.gather(-1, (below - 1).clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return below, torch.where(below > 0, last, 0.0 if before is None else before)
