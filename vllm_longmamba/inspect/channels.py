"""The channels whose receptive field is drawn."""

import numpy as np

from vllm_longmamba.inspect.measure import Channel
from vllm_longmamba.tables import ThresholdTable

_GLOBAL_CHANNELS = 2


def parse_channel(text: str, table: ThresholdTable) -> Channel:
    """A layer and a channel, such as "3:17".

    Raises:
        ValueError: the text is something else, or the table has no such channel.
    """
    layer, colon, channel = text.partition(":")
    if not colon or not layer.isdecimal() or not channel.isdecimal():
        raise ValueError(f"--channel must be LAYER:CHANNEL such as 3:17, got {text!r}")
    if int(layer) not in table.layers:
        raise ValueError(f"--channel {text}: the table has no layer {layer}; it has {sorted(table.layers)}")
    channels = len(table.layers[int(layer)].retention)
    if int(channel) >= channels:
        raise ValueError(f"--channel {text}: layer {layer} has the channels 0 to {channels - 1}; choose one of them")
    return int(layer), int(channel)


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
