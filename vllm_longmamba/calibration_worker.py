"""The worker's part of calibration: reads dt in the mixers of the running model and turns it into thresholds."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from vllm_longmamba.tables import LayerCalibration, LayerThresholds, merge_channel_shards


class CalibrationRecorder:
    """Feeds the dt of whole calibration sequences to the statistics of each layer.

    Args:
        train_length: tokens of a sequence (L).
        row_lengths: prompt lengths of the table's rows.
        clamp_percent: share of the largest dt's that are clamped (the paper's C).
    """

    def __init__(self, train_length: int, row_lengths: list[int], clamp_percent: float) -> None:
        self.train_length = train_length
        self.row_lengths = row_lengths
        self.clamp_percent = clamp_percent
        self.layers: dict[int, LayerCalibration] = {}
        self._A: dict[int, torch.Tensor] = {}

    def attach(self, mixer: Any) -> None:
        """Record a mixer from now on."""
        self._A[mixer.layer_index] = mixer.A.data
        mixer.dt_recorder = self

    def record(self, layer_index: int, dt: torch.Tensor) -> None:
        """Take the dt (train_length, channels) of one sequence.

        Raises:
            ValueError: it is not a whole sequence.
        """
        if dt.shape[0] == 0:
            # A decode step, which has no prefill tokens.
            return
        if dt.shape[0] != self.train_length:
            raise ValueError(
                f"calibration expects whole sequences of {self.train_length} tokens, but layer {layer_index} got "
                f"{dt.shape[0]}; max_num_batched_tokens must be at least the training length"
            )
        if layer_index not in self.layers:
            self.layers[layer_index] = LayerCalibration(
                self._A[layer_index], self.train_length, self.row_lengths, self.clamp_percent
            )
        self.layers[layer_index].add(dt)


class CalibrationWorkerExtension:
    """Methods that `longmamba calibrate` calls in every worker (vLLM's `worker_extension_cls`)."""

    model_runner: Any

    def longmamba_start_calibration(self, train_length: int, row_lengths: list[int], clamp_percent: float) -> None:
        """Attach a recorder to all mixers of this worker."""
        from vllm_longmamba.models import long_mixers

        self._longmamba_recorder = CalibrationRecorder(train_length, row_lengths, clamp_percent)
        for mixer in long_mixers(self.model_runner.model):
            self._longmamba_recorder.attach(mixer)

    def longmamba_save_shard(self, folder: str) -> None:
        """Write this worker's layers and channels to `folder`, named by tensor-parallel and global rank."""
        from vllm.distributed.parallel_state import get_tensor_model_parallel_rank, get_world_group

        tensors: dict[str, torch.Tensor] = {}
        for index, layer in self._longmamba_recorder.layers.items():
            result = layer.result()
            tensors[f"{index}.retention"] = result.retention.cpu().contiguous()
            tensors[f"{index}.dt_threshold"] = result.dt_threshold.cpu().contiguous()
        name = f"tp{get_tensor_model_parallel_rank():04d}-rank{get_world_group().rank:04d}.safetensors"
        save_file(tensors, Path(folder) / name)


def merge_shards(folder: Path) -> dict[int, LayerThresholds]:
    """Join what the workers wrote: layers of pipeline stages, channels in tensor-parallel order.

    Args:
        folder: where `longmamba_save_shard` wrote.

    Returns:
        The layers of the whole model.
    """
    shards: dict[int, list[LayerThresholds]] = {}
    for path in sorted(folder.glob("tp*-rank*.safetensors")):
        tensors = load_file(path)
        for index in sorted(int(name.partition(".")[0]) for name in tensors if name.endswith(".retention")):
            shard = LayerThresholds(tensors[f"{index}.retention"], tensors[f"{index}.dt_threshold"])
            shards.setdefault(index, []).append(shard)
    return {index: merge_channel_shards(parts) for index, parts in sorted(shards.items())}
