"""Runs a text through the real model, plain and filtered, at several prompt lengths, and collects what was measured."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vllm_longmamba.architectures import MODEL_IMPL
from vllm_longmamba.options import KEY
from vllm_longmamba.tables import ThresholdTable

# Arguments of vLLM's `LLM` that a measurement decides itself.
SET_HERE = (
    "worker_extension_cls", "max_num_batched_tokens", "max_num_seqs", "enable_prefix_caching", "enforce_eager"
)  # fmt: skip

_EXTENSION = "vllm_longmamba.inspect.recording.InspectWorkerExtension"
# vLLM's own patience of 5 s ends in warnings about killed processes.
_END_TIMEOUT_S = 60.0

# A channel: its layer, and its index there.
Channel = tuple[int, int]
# Layers of which a global channel is drawn by default.
_GLOBAL_CHANNELS = 2


@dataclass(frozen=True)
class LayerMeasurement:
    """One layer, for one prompt.

    Attributes:
        kept: (channels,), share of the prompt's tokens that pass the filter.
        distance: Mamba mean distance in tokens, mean of up to 64 channels.
        maps: channel -> (bins, bins) receptive field, NaN above the diagonal.
    """

    kept: np.ndarray
    distance: float
    maps: dict[int, np.ndarray]


Measurement = dict[int, LayerMeasurement]


@dataclass(frozen=True)
class Measurements:
    """What was measured on a text.

    Attributes:
        text: name of the text.
        channels: those whose receptive field was taken.
        plain: prompt length -> the model without the filter, by layer.
        filtered: prompt length -> the model with the filter, by layer; for lengths whose row filters.
    """

    text: str
    channels: list[Channel]
    plain: dict[int, Measurement]
    filtered: dict[int, Measurement]


def measure(
    model: str,
    table: ThresholdTable,
    table_path: Path,
    text: Path,
    lengths: list[int] | None,
    channels: list[Channel],
    *,
    progress: Callable[[list[Any]], Iterable[Any]] = iter,
    starting: Callable[[], AbstractContextManager[None]] = nullcontext,
    **engine_args: Any,
) -> Measurements:
    """Run prompts of several lengths, all of them beginnings of one text, without the filter and with it.

    Args:
        model: name or folder, as for `vllm serve`.
        table: the model's table, which was read from `table_path`.
        text: plain text (UTF-8).
        lengths: see `choose_lengths`.
        channels: those whose receptive field is taken.
        progress: wraps the iteration over the prompts, for a progress bar.
        starting: what the engine is started in.
        engine_args: further arguments of vLLM's `LLM`, such as `dtype`; none of `SET_HERE`.

    Raises:
        ValueError: the text is not UTF-8, or shorter than the training length or a length asked for.
    """
    from vllm import LLM, SamplingParams

    try:
        # Before the engine starts.
        content = text.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{text}: texts must be UTF-8, but {error}; convert the file") from error
    once = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
    longest = max(lengths) if lengths else 8 * table.metadata.train_length
    config = engine_args.pop("additional_config", {})
    with starting():
        llm = LLM(
            model,
            additional_config=config | {KEY: config.get(KEY, {}) | {"table": str(table_path.resolve())}},
            worker_extension_cls=_EXTENSION,
            max_model_len=longest + 1,
            max_num_batched_tokens=longest + 1,
            max_num_seqs=1,
            enable_prefix_caching=False,
            # A compiled model does not call the hooks that measure.
            enforce_eager=True,
            **{"model_impl": MODEL_IMPL, **engine_args},
        )
    try:
        tokens = llm.get_tokenizer().encode(content, add_special_tokens=False)
        lengths = choose_lengths(lengths, table.metadata.train_length, len(tokens))
        passes = [(length, is_filtered) for length in lengths for is_filtered in (False, True)]
        passes = [(length, is_filtered) for length, is_filtered in passes if table.row_of(length) or not is_filtered]
        results: dict[bool, dict[int, Measurement]] = {False: {}, True: {}}
        for length, is_filtered in progress(passes):
            llm.collective_rpc("longmamba_inspect_begin", args=(table.row_of(length), is_filtered, channels))
            llm.generate({"prompt_token_ids": tokens[:length]}, once, use_tqdm=False)
            (layers,) = llm.collective_rpc("longmamba_inspect_end")
            results[is_filtered][length] = {layer: _layer(content) for layer, content in sorted(layers.items())}
    finally:
        llm.llm_engine.engine_core.shutdown(timeout=_END_TIMEOUT_S)
    return Measurements(text.name, channels, results[False], results[True])


def choose_lengths(lengths: list[int] | None, train_length: int, available: int) -> list[int]:
    """The prompt lengths to measure in tokens, ascending: those asked for, all of which the text must have.

    By default they are 1, 2, 4 and 8 training lengths, as far as the available tokens of the text go.

    Raises:
        ValueError: the text is too short.
    """
    wanted = sorted(set(lengths)) if lengths else [factor * train_length for factor in (1, 2, 4, 8)]
    fitting = [length for length in wanted if length <= available]
    if not fitting or (lengths and len(fitting) < len(wanted)):
        needed = wanted[-1] if lengths else wanted[0]
        raise ValueError(
            f"the text has {available} tokens, but prompts of {needed} are to be measured; give a longer --text or "
            "smaller --lengths"
        )
    return fitting


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


def _layer(content: dict[str, Any]) -> LayerMeasurement:
    maps = {channel: np.array(pixels) for channel, pixels in content["maps"].items()}
    return LayerMeasurement(np.array(content["kept"]), content["distance"], maps)
