"""The search for global channels that are better left unfiltered, because their filter costs text.

A head of a late layer may remember far back and yet serve the prediction of the next tokens; the filter takes from it
what was just read (docs/closed_loop.md).
"""

from collections.abc import Callable

from vllm_longmamba.evaluate.tuning import Candidate, Score, TriedTable, candidate
from vllm_longmamba.tables import ThresholdTable, filtered_channels, leave_unfiltered

# Up to so many global channels are tried one by one (heads of Mamba-2), more of them (Mamba-1) layer by layer.
MOST_SINGLE = 512


def parts_of(table: ThresholdTable, min_retention: float) -> list[str]:
    """What can be left unfiltered by itself: names as in `leave_unfiltered`."""
    filtered = filtered_channels(table, min_retention)
    if table.count_global(min_retention) > MOST_SINGLE:
        return [str(layer) for layer in filtered]
    return [f"{layer}.{channel}" for layer, channels in filtered.items() for channel in channels]


def search_unfiltered(
    score: Callable[[Candidate], Score], score_text: Callable[[Candidate], Score], tried: TriedTable, best: Score
) -> list[Score]:
    """Leave out what costs text: each part by itself, then the 1, 2, 4, 8 ... most costly ones together.

    Args:
        score: scores a setting, by keys and text.
        score_text: scores a setting by text alone.
        tried: the table of the best setting so far.
        best: its score, which must have a loss.

    Returns:
        The scores of the parts left out together; none where no part costs anything.
    """
    assert best.loss is not None, "the search for unfiltered channels goes by the loss of text"
    setting = best.candidate
    already = list(setting.unfiltered)
    gains = {}
    for part in parts_of(leave_unfiltered(tried.table, already), setting.min_retention):
        loss = score_text(candidate(tried, setting.min_retention, [*already, part])).loss
        assert loss is not None
        gains[part] = best.loss["loss"] - loss["loss"]
    costly = sorted((part for part in gains if gains[part] > 0), key=lambda part: -gains[part])
    sizes = sorted({len(costly), *(2**power for power in range(len(costly).bit_length()))} - {0})
    return [score(candidate(tried, setting.min_retention, [*already, *costly[:size]])) for size in sizes]
