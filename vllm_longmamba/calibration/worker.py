"""The worker's part of calibration: reads dt in the mixers of the running model and turns it into thresholds."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from vllm_longmamba.tables import (
    MEAN,
    LayerCalibration,
    LayerThresholds,
    layer_budgets,
    merge_channel_shards,
    table_from_bytes,
)

# Tensor-parallel rank of a worker, and its channels of its layers: (retention, dt_threshold).
WorkerLayers = tuple[int, dict[int, tuple[torch.Tensor, torch.Tensor]]]


class CalibrationRecorder:
    """Feeds the dt of calibration sequences to the statistics of each layer, one sequence after the other.

    Args:
        train_length: tokens of a sequence (L).
        row_lengths: prompt lengths of the table's rows.
        clamp_percent: share of the largest dt's that are clamped (the paper's C).
        combine: how the thresholds of the sequences become one.
        budget: what a channel may keep, as a factor of its sum over the training length.
        channel_budgets: channels of which it is another one; see `read_channel_budgets`.
    """

    def __init__(
        self,
        train_length: int,
        row_lengths: list[int],
        clamp_percent: float,
        combine: str = MEAN,
        budget: float = 1.0,
        channel_budgets: Sequence[str] = (),
    ) -> None:
        self.train_length = train_length
        self.row_lengths = row_lengths
        self.clamp_percent = clamp_percent
        self.combine = combine
        self.budget = budget
        self.channel_budgets = channel_budgets
        self.layers: dict[int, LayerCalibration] = {}
        self._A: dict[int, torch.Tensor] = {}
        # Layer -> (channels,) budgets.
        self._budgets: dict[int, torch.Tensor] = {}
        # Layer -> (train_length, channels) on the host and how much of it is filled, where a sequence comes in chunks.
        self._chunks: dict[int, tuple[torch.Tensor, int]] = {}

    def attach(self, mixer: Any, A: torch.Tensor, tp_rank: int = 0) -> None:
        """Record a mixer from now on, whose A is (channels,) or (channels, d_state): this rank's channels."""
        self._A[mixer.layer_index] = A
        channels = range(tp_rank * A.shape[0], (tp_rank + 1) * A.shape[0])
        self._budgets[mixer.layer_index] = layer_budgets(self.channel_budgets, mixer.layer_index, channels, self.budget)
        mixer.dt_recorder = self

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

    def finish(self, num_sequences: int) -> dict[int, LayerThresholds]:
        """The thresholds of this worker's channels.

        Raises:
            RuntimeError: not all layers have seen that many whole sequences.
        """
        self.check(num_sequences)
        return {index: layer.result() for index, layer in self.layers.items()}

    def check(self, num_sequences: int) -> None:
        """Raises RuntimeError unless all layers have seen that many whole sequences."""
        seen = sorted({self.layers[index].num_sequences if index in self.layers else 0 for index in self._A})
        if self._chunks or seen not in ([], [num_sequences]):
            raise RuntimeError(
                f"calibration: every layer must have seen {num_sequences} whole sequences of {self.train_length} "
                f"tokens, but they saw {seen}; --max-num-batched-tokens must be at least 2"
            )

    def _add(self, layer_index: int, dt: torch.Tensor) -> None:
        if layer_index not in self.layers:
            self.layers[layer_index] = LayerCalibration(
                self._A[layer_index],
                self.train_length,
                self.row_lengths,
                self.clamp_percent,
                self.combine,
                self._budgets[layer_index],
            )
        with _without_thread_warnings():
            self.layers[layer_index].add(dt)


@contextmanager
def _without_thread_warnings() -> Iterator[None]:
    # vLLM's CPU worker refuses torch.set_num_threads with a warning each time.
    logger = logging.getLogger("vllm.v1.worker.cpu_worker")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def start_calibration(
    worker: Any,
    train_length: int,
    row_lengths: list[int],
    clamp_percent: float,
    combine: str,
    budget: float = 1.0,
    channel_budgets: Sequence[str] = (),
    dummy_weights: bool = False,
) -> dict[int, int]:
    """Attach a recorder to all mixers of a worker.

    Args:
        worker: vLLM's worker.
        train_length: tokens of a sequence (L).
        row_lengths: prompt lengths of the table's rows.
        clamp_percent: share of the largest dt's that are clamped.
        combine: how the thresholds of the sequences become one.
        budget: what a channel may keep, as a factor of its sum over the training length.
        channel_budgets: channels of which it is another one; see `read_channel_budgets`.
        dummy_weights: the weights are random, A among them, which then is made negative as a real one is.

    Returns:
        Layer index -> channels of all tensor-parallel ranks.
    """
    from vllm.distributed.parallel_state import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

    from vllm_longmamba.layers.filtered_mixer import filtered_mixers

    worker.longmamba_recorder = CalibrationRecorder(
        train_length, row_lengths, clamp_percent, combine, budget, channel_budgets
    )
    tp_rank, tp_size = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    channels = {}
    for mixer in filtered_mixers(worker.get_model()):
        A = mixer.A.data
        worker.longmamba_recorder.attach(mixer, -A.abs().clamp(min=1e-6) if dummy_weights else A, tp_rank)
        channels[mixer.layer_index] = tp_size * A.shape[0]
    return channels


def finish_calibration(worker: Any, num_sequences: int) -> WorkerLayers:
    """Take the recorder off again and return what it found, in host memory."""
    from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

    from vllm_longmamba.layers.filtered_mixer import filtered_mixers

    for mixer in filtered_mixers(worker.get_model()):
        mixer.dt_recorder = None
    layers = worker.longmamba_recorder.finish(num_sequences)
    worker.longmamba_recorder = None
    return get_tensor_model_parallel_rank(), {
        index: (layer.retention, layer.dt_threshold) for index, layer in layers.items()
    }


def use_table(worker: Any, content: bytes) -> None:
    """Put a table into a worker that was built with an empty one of the same rows.

    Args:
        worker: vLLM's worker.
        content: what `table_to_bytes` returned.
    """
    from vllm.distributed.parallel_state import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
    from vllm.utils.torch_utils import set_random_seed

    from vllm_longmamba.layers.filtered_mixer import filtered_mixers
    from vllm_longmamba.layers.prompt_filter import PromptFilter
    from vllm_longmamba.options import options_from_config

    options = options_from_config(worker.vllm_config.additional_config)
    prompt_filter = PromptFilter.from_options(table_from_bytes(content), options)
    for mixer in filtered_mixers(worker.get_model()):
        mixer.set_filter(prompt_filter, get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size())
    # As vLLM does after its own warm-up: a start with and one without calibration must sample the same.
    set_random_seed(worker.model_config.seed, worker.parallel_config.data_parallel_index)
    torch.accelerator.empty_cache()


def merge_workers(results: Iterable[WorkerLayers]) -> dict[int, LayerThresholds]:
    """Join what the workers returned: layers of pipeline stages, channels in tensor-parallel order."""
    shards: dict[int, list[LayerThresholds]] = {}
    for _, layers in sorted(results, key=lambda result: result[0]):
        for index, (retention, dt_threshold) in layers.items():
            shards.setdefault(index, []).append(LayerThresholds(retention, dt_threshold))
    return {index: merge_channel_shards(parts) for index, parts in sorted(shards.items())}


class CalibrationWorkerExtension:
    """Methods that `longmamba calibrate` calls in every worker (vLLM's `worker_extension_cls`)."""

    def longmamba_start_calibration(
        self,
        train_length: int,
        row_lengths: list[int],
        clamp_percent: float,
        combine: str,
        budget: float,
        channel_budgets: Sequence[str],
    ) -> dict[int, int]:
        """See `start_calibration`."""
        return start_calibration(self, train_length, row_lengths, clamp_percent, combine, budget, channel_budgets)

    def longmamba_close_loop(
        self, num_sequences: int, min_retention: float, lengths: list[int], combine: str, budget: float
    ) -> None:
        """See `close_loop`."""
        from vllm_longmamba.calibration.closed_loop import close_loop

        close_loop(self, num_sequences, min_retention, lengths, combine, budget)

    def longmamba_start_length(self, length: int) -> None:
        """See `start_length`."""
        from vllm_longmamba.calibration.closed_loop import start_length

        start_length(self, length)

    def longmamba_save_shard(self, folder: str, num_sequences: int) -> None:
        """Write what `finish_calibration` returns to `folder`."""
        from vllm.distributed.parallel_state import get_world_group

        tp_rank, layers = finish_calibration(self, num_sequences)
        tensors: dict[str, torch.Tensor] = {}
        for index, (retention, dt_threshold) in layers.items():
            tensors[f"{index}.retention"] = retention.contiguous()
            tensors[f"{index}.dt_threshold"] = dt_threshold.contiguous()
        save_file(tensors, Path(folder) / f"tp{tp_rank:04d}-rank{get_world_group().rank:04d}.safetensors")


def merge_shards(folder: Path) -> dict[int, LayerThresholds]:
    """Join what the workers wrote with `longmamba_save_shard`: the layers of the whole model."""
    results: list[WorkerLayers] = []
    for path in folder.glob("tp*-rank*.safetensors"):
        tensors = load_file(path)
        indices = [int(name.partition(".")[0]) for name in tensors if name.endswith(".retention")]
        layers = {index: (tensors[f"{index}.retention"], tensors[f"{index}.dt_threshold"]) for index in indices}
        results.append((int(path.name[2:6]), layers))
    return merge_workers(results)
