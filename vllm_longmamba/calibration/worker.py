"""What an engine's workers do while the model is calibrated."""

from collections.abc import Iterable
from typing import Any

import torch

from vllm_longmamba.calibration.recorder import CalibrationRecorder
from vllm_longmamba.calibration.settings import CalibrationSettings
from vllm_longmamba.checkpoint.fingerprint import DUMMY
from vllm_longmamba.layers.prompt_filter import PromptFilter
from vllm_longmamba.options import options_from_config
from vllm_longmamba.tables import LayerThresholds, merge_channel_shards, table_from_bytes

# Tensor-parallel rank of a worker, and its channels of its layers.
WorkerLayers = tuple[int, dict[int, LayerThresholds]]


def start_calibration(worker: Any, settings: CalibrationSettings) -> None:
    """Attach a recorder to all mixers of a worker.

    Args:
        worker: vLLM's worker.
        settings: complete ones, see prepare.py. Of random weights A is random, too, and is made negative.
    """
    from vllm_longmamba.layers.filtered_mixer import filtered_mixers

    worker.longmamba_recorder = CalibrationRecorder(settings)
    for mixer in filtered_mixers(worker.get_model()):
        A = mixer.A.data
        if settings.weights_fingerprint == DUMMY:
            A = -A.abs().clamp(min=1e-6)
        worker.longmamba_recorder.attach(mixer, A)


def finish_calibration(worker: Any) -> WorkerLayers:
    """Take the recorder off again and return what it found, in host memory."""
    from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

    from vllm_longmamba.layers.filtered_mixer import filtered_mixers

    for mixer in filtered_mixers(worker.get_model()):
        mixer.dt_recorder = None
    layers = worker.longmamba_recorder.finish()
    worker.longmamba_recorder = None
    return get_tensor_model_parallel_rank(), layers


def use_table(worker: Any, content: bytes) -> None:
    """Put a table into a worker that was built with an empty one of the same rows.

    Args:
        worker: vLLM's worker.
        content: what `table_to_bytes` returned.
    """
    from vllm.utils.torch_utils import set_random_seed

    from vllm_longmamba.layers.replace_table import replace_table

    options = options_from_config(worker.vllm_config.additional_config)
    replace_table(worker.get_model(), PromptFilter.from_options(table_from_bytes(content), options))
    # As vLLM does after its own warm-up: a start with and one without calibration must sample the same.
    set_random_seed(worker.model_config.seed, worker.parallel_config.data_parallel_index)
    torch.accelerator.empty_cache()


def merge_workers(results: Iterable[WorkerLayers]) -> dict[int, LayerThresholds]:
    """Join what the workers returned: layers of pipeline stages, channels in tensor-parallel order."""
    shards: dict[int, list[LayerThresholds]] = {}
    for _, layers in sorted(results, key=lambda result: result[0]):
        for index, layer in layers.items():
            shards.setdefault(index, []).append(layer)
    return {index: merge_channel_shards(parts) for index, parts in sorted(shards.items())}
