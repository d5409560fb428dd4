"""Budgets of single channels: some keep more, or less, of long prompts than the others."""

from collections.abc import Iterable

import torch
from torch import Tensor

from .ranges import check_range
from .unfiltered import read_place


def read_channel_budgets(names: Iterable[str]) -> dict[tuple[int, int], float]:
    """Reads "LAYER.CHANNEL=BUDGET".

    Args:
        names: such as "3.2=4"; a channel: of d_inner in Mamba-1, a head in Mamba-2.

    Returns:
        (layer, channel) -> what the channel may keep, as a factor of its sum over the training length.

    Raises:
        ValueError: another form, a budget that is not above 0, or a channel named twice.
    """
    found: dict[tuple[int, int], float] = {}
    for name in names:
        place, _, value = name.partition("=")
        try:
            layer, channel = read_place(place)
            budget = float(value)
        except ValueError:
            raise ValueError(f"channel_budgets: must be LAYER.CHANNEL=BUDGET, such as 3.2=4, got {name!r}") from None
        check_range("budget", budget, "channel_budgets")
        if (layer, channel) in found:
            raise ValueError(f"channel_budgets: {name!r} is no channel, LAYER.CHANNEL, or named twice")
        found[layer, channel] = budget
    return found


def layer_budgets(names: Iterable[str], layer: int, channels: range, budget: float) -> Tensor:
    """Returns the budgets of some channels of a layer, (len(channels),) float64.

    Args:
        names: see `read_channel_budgets`.
        layer: its index.
        channels: which of the layer's channels; a tensor-parallel rank has a part of them.
        budget: of those not named, as a factor of a channel's sum over the training length.

    Raises:
        ValueError: as `read_channel_budgets`.
    """
    budgets = torch.full((len(channels),), budget, dtype=torch.float64)
    for (of_layer, channel), own in read_channel_budgets(names).items():
        if of_layer == layer and channel in channels:
            budgets[channel - channels.start] = own
    return budgets
