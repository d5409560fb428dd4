"""Closed-loop calibration: thresholds from text as long as the prompts, the filter already on in the layers below."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from vllm_longmamba.calibration.recorder import CalibrationRecorder
from vllm_longmamba.calibration.sequences import draw_sequences
from vllm_longmamba.calibration.settings import CalibrationSettings
from vllm_longmamba.tables import (
    NO_FILTER,
    LayerThresholds,
    budget_thresholds,
    combine_thresholds,
    interpolate_thresholds,
)


def long_sequences(texts: Sequence[list[int]], length: int, number: int, seed: int) -> list[list[int]]:
    """Draw calibration sequences of any length.

    As `draw_sequences` does where the text is long enough. Otherwise the sequences begin at evenly spread places of the
    joined texts, overlap, and go on at the beginning where these end.

    Args:
        texts: tokens of each text, not all empty.
        length, number, seed: see `draw_sequences`.
    """
    joined = [token for tokens in texts for token in tokens]
    if len(joined) // length >= number:
        return draw_sequences(texts, length, number, seed)
    start = int(np.random.default_rng(seed).integers(len(joined)))
    starts = [(start + place * len(joined) // number) % len(joined) for place in range(number)]
    return [(joined[start:] + joined * (length // len(joined) + 1))[:length] for start in starts]


def closed_loop_sequences(
    texts: Sequence[list[int]], lengths: Sequence[int], number: int, seed: int
) -> list[list[int]]:
    """All sequences of a closed-loop calibration, the shortest first, `number` of each length; see `long_sequences`."""
    return [sequence for length in lengths for sequence in long_sequences(texts, length, number, seed)]


class ClosedLoopRecorder:
    """Measures thresholds at the length where they act, and lets each layer filter by them at once.

    Args:
        calibration: the recorder that has seen the sequences of the training length.
    """

    def __init__(self, calibration: CalibrationRecorder) -> None:
        settings = calibration.settings
        self.settings = settings
        self._row_lengths = calibration.row_lengths
        self._layers = {index: layer.result() for index, layer in calibration.layers.items()}
        self._is_global = {index: layer.retention > settings.theta for index, layer in self._layers.items()}
        self._budgets = {index: settings.budget * layer.budget() for index, layer in calibration.layers.items()}
        # Layer -> length -> (channels,) of each sequence, in host memory.
        self._found: dict[int, dict[int, list[torch.Tensor]]] = {
            index: {length: [] for length in settings.measured_lengths} for index in self._layers
        }
        self._cut: set[int] = set()

    def record(self, layer_index: int, dt: torch.Tensor) -> torch.Tensor | None:
        """Take the dt (tokens, channels) of a whole sequence and return its thresholds, -1.0 in local channels.

        The last token, which follows the sequence, is filtered, but does not count. A decode step comes here without
        tokens.
        """
        if dt.shape[0] == 0:
            return None
        length = dt.shape[0] - 1
        if length not in self.settings.measured_lengths:
            self._cut.add(dt.shape[0])
            return None
        thresholds = budget_thresholds(dt[:length], self._budgets[layer_index].to(dt.device))
        self._found[layer_index][length].append(thresholds.cpu())
        return torch.where(self._is_global[layer_index].to(dt.device), thresholds, NO_FILTER)

    def finish(self) -> dict[int, LayerThresholds]:
        """The thresholds of this worker's channels.

        Raises:
            RuntimeError: a sequence came in chunks, or not all layers have seen all sequences of each length.
        """
        number, lengths = self.settings.num_sequences, self.settings.measured_lengths
        seen = {len(found) for by_length in self._found.values() for found in by_length.values()}
        if self._cut or seen not in (set(), {number}):
            raise RuntimeError(
                f"calibration: every layer must have seen {number} sequences of each of {list(lengths)} tokens, in one "
                f"step each, but they saw {sorted(seen)}, and chunks of {sorted(self._cut)} tokens; raise "
                f"--max-num-batched-tokens to {lengths[-1] + 1}, or measure shorter lengths"
            )
        return {index: self._layer(index) for index in self._layers}

    def _layer(self, index: int) -> LayerThresholds:
        found, lengths = self._found[index], self.settings.measured_lengths
        measured = torch.stack(
            [combine_thresholds(torch.stack(found[length]), self.settings.way_to_combine) for length in lengths]
        )
        rows = interpolate_thresholds(lengths, measured, self._row_lengths)
        return LayerThresholds(self._layers[index].retention, rows)


def close_loop(worker: Any) -> None:
    """Go on from the sequences of the training length to a `ClosedLoopRecorder`."""
    from vllm_longmamba.layers.filtered_mixer import filtered_mixers

    recorder = worker.longmamba_recorder
    recorder.check()
    worker.longmamba_recorder = ClosedLoopRecorder(recorder)
    for mixer in filtered_mixers(worker.get_model()):
        mixer.dt_recorder = worker.longmamba_recorder


def run_closed_loop(
    settings: CalibrationSettings, executor: Any, texts: Sequence[list[int]], run: Callable[[list[int]], None]
) -> None:
    """The second part of a closed-loop calibration: the sequences of the measured lengths.

    Args:
        settings: those of the calibration.
        executor: vLLM's executor, whose workers have recorded the sequences of the training length.
        texts: tokens of each text.
        run: runs a sequence, and one token that follows it, through the model.
    """
    executor.collective_rpc(close_loop)
    for sequence in closed_loop_sequences(texts, settings.measured_lengths, settings.num_sequences, settings.seed):
        run(sequence)
