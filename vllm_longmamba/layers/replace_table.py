"""The one place that puts thresholds into a running model."""

from typing import Any

from vllm.distributed.parallel_state import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

from vllm_longmamba.layers.filtered_mixer import filtered_mixers
from vllm_longmamba.layers.prompt_filter import PromptFilter


def replace_table(model: Any, prompt_filter: PromptFilter) -> None:
    """Filter by these thresholds from now on: in all layers of this worker and, as they ask a layer, its builders.

    A filter that the model has already is replaced in place, where captured CUDA graphs read it. Nothing is changed
    where the table does not fit.

    Args:
        model: the worker's model; a pipeline stage may have no Mamba layers.
        prompt_filter: the new filter.

    Raises:
        ValueError: the table lacks a layer, or has other channels, or other rows than the present one.
    """
    rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    mixers = filtered_mixers(model)
    present = mixers[0].prompt_filter if mixers else None
    if present is not None and list(prompt_filter.table.row_lengths) != list(present.table.row_lengths):
        raise ValueError(
            "the new threshold table does not fit the present one: its rows are for other prompt lengths; make both "
            "with the same training length and longest prompt"
        )
    thresholds = [mixer.own_thresholds(prompt_filter, rank, ranks) for mixer in mixers]
    for mixer, mine in zip(mixers, thresholds, strict=True):
        mixer.set_filter(prompt_filter, mine)
