"""Which layers and channels are shown."""

import numpy as np

from vllm_longmamba.inspect.measure import Channel
from vllm_longmamba.tables import ThresholdTable

_GLOBAL_CHANNELS = 2


def parse_numbers(text: str, option: str) -> list[int]:
    """Numbers and ranges such as "0,4-7".

    Raises:
        ValueError: the text is something else.
    """
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"{option} must be numbers and ranges such as 0,4-7, got {text!r}")
        numbers += range(int(first), int(last if dash else first) + 1)
    return sorted(set(numbers))


def parse_channel(text: str, table: ThresholdTable) -> Channel:
    """A layer and a channel, such as "3:17".

    Raises:
        ValueError: the text is something else, or the table has no such channel.
    """
    layer, colon, channel = text.partition(":")
    if not colon or not layer.isdecimal() or not channel.isdecimal():
        raise ValueError(f"--channel must be LAYER:CHANNEL such as 3:17, got {text!r}")
    (index,) = check_layers([int(layer)], table)
    channels = len(table.layers[index].retention)
    if int(channel) >= channels:
        raise ValueError(f"--channel {text}: layer {index} has the channels 0 to {channels - 1}; choose one of them")
    return index, int(channel)


def check_layers(layers: list[int], table: ThresholdTable) -> list[int]:
    """The layers, if the table has them all.

    Raises:
        ValueError: it lacks one.
    """
    if unknown := [layer for layer in layers if layer not in table.layers]:
        raise ValueError(f"the table has no layers {unknown}; it has {sorted(table.layers)}")
    return layers


def choose_channels(table: ThresholdTable) -> list[Channel]:
    """For pictures of single channels: two global channels of different layers, and a local one.

    Returns:
        The channel of median retention among the global ones of the two layers that have most of them, then the local
        channel of largest retention in the first of these layers.
    """
    by_count = sorted(table.layers, key=lambda layer: (-int(table.is_global(layer).sum()), layer))
    chosen: list[Channel] = []
    for layer in sorted(by_count[:_GLOBAL_CHANNELS]):
        is_global = table.is_global(layer).numpy()
        ranked = np.argsort(table.layers[layer].retention.numpy(), kind="stable")
        of_global = ranked[is_global[ranked]]
        if len(of_global):
            chosen.append((layer, int(of_global[len(of_global) // 2])))
    retention = table.layers[by_count[0]].retention.masked_fill(table.is_global(by_count[0]), -1.0)
    if bool((retention >= 0).any()):
        chosen.append((by_count[0], int(retention.argmax())))
    return chosen
