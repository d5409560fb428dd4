"""Reads dt in the mixers of the running model and turns it into thresholds."""

from typing import Any

import torch

from vllm_longmamba.calibration.settings import CalibrationSettings
from vllm_longmamba.compatibility import errors_only
from vllm_longmamba.tables import LayerCalibration, LayerThresholds


class CalibrationRecorder:
    """Feeds the dt of calibration sequences to the statistics of each layer, one sequence after the other.

    Args:
        settings: complete ones, see prepare.py.
    """

    def __init__(self, settings: CalibrationSettings) -> None:
        self.settings = settings
        self.metadata = settings.metadata()
        self.train_length = self.metadata.train_length
        self.row_lengths = settings.row_lengths
        self.layers: dict[int, LayerCalibration] = {}
        self._A: dict[int, torch.Tensor] = {}
        # Layer -> (train_length, channels) on the host and how much of it is filled, where a sequence comes in chunks.
        self._chunks: dict[int, tuple[torch.Tensor, int]] = {}

    def attach(self, mixer: Any, A: torch.Tensor) -> None:
        """Record a mixer from now on, whose A is (channels,) or (channels, d_state): this rank's channels."""
        self._A[mixer.layer_index] = A
        mixer.dt_recorder = self.record

    def record(self, layer_index: int, dt: torch.Tensor) -> None:
        """Take the dt (tokens, channels) of the next tokens of a sequence.

        Of a sequence, the first train_length tokens count. Those that follow must be in the same chunk, or be a decode
        step, which comes here without tokens.
        """
        if dt.shape[0] == 0:
            return
        if layer_index not in self._chunks and dt.shape[0] >= self.train_length:
            self._add(layer_index, dt[: self.train_length])
            return
        # On the host, because all layers keep theirs at once.
        empty = torch.empty(self.train_length, dt.shape[1], dtype=torch.float32)
        whole, filled = self._chunks.pop(layer_index, (empty, 0))
        taken = min(dt.shape[0], self.train_length - filled)
        whole[filled : filled + taken] = dt[:taken].cpu()
        if filled + taken == self.train_length:
            self._add(layer_index, whole.to(dt.device))
        else:
            self._chunks[layer_index] = whole, filled + taken

    def finish(self) -> dict[int, LayerThresholds]:
        """The thresholds of this worker's channels.

        Raises:
            RuntimeError: not all layers have seen all sequences, each of them whole.
        """
        number = self.settings.num_sequences
        seen = sorted({self.layers[index].num_sequences if index in self.layers else 0 for index in self._A})
        if self._chunks or seen not in ([], [number]):
            raise RuntimeError(
                f"calibration: every layer must have seen {number} whole sequences of {self.train_length} tokens, but "
                f"they saw {seen}; --max-num-batched-tokens must be at least 2"
            )
        return {index: layer.result() for index, layer in self.layers.items()}

    def _add(self, layer_index: int, dt: torch.Tensor) -> None:
        if layer_index not in self.layers:
            self.layers[layer_index] = LayerCalibration(
                self._A[layer_index],
                self.train_length,
                self.row_lengths,
                self.metadata.clamp_percent,
                self.metadata.method,
                self.metadata.budget,
            )
        # vLLM's CPU worker refuses torch.set_num_threads with a warning each time.
        with errors_only("vllm.v1.worker.cpu_worker"):
            self.layers[layer_index].add(dt)
