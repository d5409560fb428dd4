"""The step metadata of DeciMamba's layers: which prompts lose tokens in a step, and how long they are at each stage."""

from copy import copy
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backends.mamba1_attn import Mamba1AttentionBackend
from vllm.v1.attention.backends.mamba2_attn import Mamba2AttentionBackend
from vllm.v1.attention.backends.utils import compute_causal_conv1d_metadata

from vllm_longmamba.decimamba_options import DeciMambaOptions
from vllm_longmamba.layers.decimation import Choice, Int32Array, StepDecimation, choice_arrays, stage_lengths
from vllm_longmamba.layers.prompt_filter import has_no_prompt_lengths, step_lengths
from vllm_longmamba.layers.step_metadata import (
    LongMamba1Metadata,
    LongMamba1MetadataBuilder,
    LongMamba2Metadata,
    LongMamba2MetadataBuilder,
)


@dataclass
class DeciMamba1Metadata(LongMamba1Metadata):
    """Metadata of a step for Mamba-1 layers. `decimation` is None where no prompt of the step loses tokens."""

    decimation: StepDecimation | None = None


@dataclass
class DeciMamba2Metadata(LongMamba2Metadata):
    """Metadata of a step for Mamba-2 layers. `decimation` is None where no prompt of the step loses tokens."""

    decimation: StepDecimation | None = None


def droppable_tokens(
    options: DeciMambaOptions, prompt_lengths: Int32Array, sequence_lengths: Int32Array, query_lengths: Int32Array
) -> Int32Array:
    """How many of each request's first tokens may be dropped: all of a prompt but the last, 0 of a short one.

    Generated tokens are never dropped, where a preempted request is read again over its prompt and those.

    Args:
        options: of the engine.
        prompt_lengths: (num_reqs,) tokens of each request's prompt (S); 0 for padding.
        sequence_lengths: (num_reqs,) tokens of each request after this step.
        query_lengths: (num_reqs,) tokens of each request in this step.

    Raises:
        RuntimeError: a prompt that is to be decimated is not all in this step, and must not be cut.
    """
    is_decimated = options.is_decimated(prompt_lengths)
    is_cut = (sequence_lengths > query_lengths) | (query_lengths < prompt_lengths)
    if not options.cut_prompts and (is_decimated & is_cut).any():
        raise RuntimeError(
            "vllm_longmamba: vLLM cut a prompt into several steps, but DeciMamba chooses tokens over the whole prompt; "
            "this vLLM has changed, please report it"
        )
    return np.where(is_decimated, prompt_lengths - 1, 0).astype(np.int32)


class _DecimationBuilder:
    """Adds a step's decimation to the metadata of a builder of step_metadata.py."""

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False, **kwargs: Any) -> Any:
        """See vLLM's `AttentionMetadataBuilder.build`."""
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build, **kwargs)  # type: ignore[misc]
        if metadata.num_prefills > 0:
            metadata.decimation = self._decimation(metadata, common_attn_metadata)
        return metadata

    def _decimation(self, metadata: Any, common: Any) -> StepDecimation | None:
        if has_no_prompt_lengths(common):
            return None
        options: DeciMambaOptions = self._mixer.options  # type: ignore[attr-defined]
        requests = slice(metadata.num_decodes, metadata.num_decodes + metadata.num_prefills)
        prompts, sequences, queries = (lengths[requests] for lengths in step_lengths(common))
        if not options.is_decimated(prompts).any():
            return None
        droppable, before = droppable_tokens(options, prompts, sequences, queries), sequences - queries
        always = np.maximum(sequences - np.maximum(before, droppable), 0)
        lengths = stage_lengths(queries, before, droppable, options.tokens_kept())
        choices = [
            Choice(*(async_tensor_h2d(array, dtype=torch.int64, device=self._device) for array in arrays))
            for arrays in (choice_arrays(*both, always) for both in pairwise(lengths))
        ]
        starts = [torch.from_numpy(np.concatenate([[0], later.cumsum()]).astype(np.int32)) for later in lengths[1:]]
        return StepDecimation([metadata, *(self._with_prompts_at(metadata, each) for each in starts)], choices)

    def _with_prompts_at(self, metadata: Any, starts: torch.Tensor) -> Any:
        """The metadata of the same step if its prompts began at these tokens: (sequences + 1,) int32 on the host."""
        shorter = copy(metadata)
        shorter.num_prefill_tokens = int(starts[-1])
        shorter.query_start_loc_p = async_tensor_h2d(starts, dtype=torch.int32, device=self._device)
        if not self._mixer.runs_own_kernels():  # type: ignore[attr-defined]
            of_convolution = compute_causal_conv1d_metadata(starts, device=self._device)
            shorter.nums_dict, shorter.batch_ptr, shorter.token_chunk_offset_ptr = of_convolution
        return shorter

    @property
    def _device(self) -> torch.device:
        return self._graph_rows.device  # type: ignore[attr-defined, no-any-return]


class DeciMamba1MetadataBuilder(_DecimationBuilder, LongMamba1MetadataBuilder):
    """Builder for Mamba-1 layers."""

    metadata_cls = DeciMamba1Metadata


class DeciMamba2MetadataBuilder(_DecimationBuilder, LongMamba2MetadataBuilder):
    """Builder for Mamba-2 layers."""

    metadata_cls = DeciMamba2Metadata

    def _with_prompts_at(self, metadata: Any, starts: torch.Tensor) -> Any:
        """Also the chunks of vLLM's SSD kernels."""
        shorter = super()._with_prompts_at(metadata, starts)
        nothing_before = torch.zeros(len(starts) - 1, dtype=torch.int32)
        *chunks, _ = self._compute_chunk_metadata(self.chunk_size, len(nothing_before), nothing_before, starts)
        shorter.cu_chunk_seqlen_p, shorter.seq_idx_p, shorter.last_chunk_indices_p = (
            async_tensor_h2d(values, dtype=torch.int32, device=self._device) for values in chunks
        )
        return shorter


class DeciMamba1Backend(Mamba1AttentionBackend):  # type: ignore[misc]
    """Names the builder for Mamba-1 layers."""

    @staticmethod
    def get_builder_cls() -> type[DeciMamba1MetadataBuilder]:
        return DeciMamba1MetadataBuilder


class DeciMamba2Backend(Mamba2AttentionBackend):  # type: ignore[misc]
    """Names the builder for Mamba-2 layers."""

    @staticmethod
    def get_builder_cls() -> type[DeciMamba2MetadataBuilder]:
        return DeciMamba2MetadataBuilder
