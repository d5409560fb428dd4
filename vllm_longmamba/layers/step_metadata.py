"""vLLM's Mamba metadata builders, extended by the rows of the threshold table for the tokens of a step."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backends.mamba1_attn import (
    Mamba1AttentionBackend,
    Mamba1AttentionMetadata,
    Mamba1AttentionMetadataBuilder,
)
from vllm.v1.attention.backends.mamba2_attn import (
    Mamba2AttentionBackend,
    Mamba2AttentionMetadata,
    Mamba2AttentionMetadataBuilder,
)
from vllm.v1.attention.backends.utils import NULL_BLOCK_ID, mamba_get_block_table_tensor

from vllm_longmamba.layers.prompt_filter import PromptFilter, StepRows, step_rows_from_metadata


@dataclass
class FilterRows:
    """Rows of the threshold table, on the device. A part is None where the step has no such tokens.

    Attributes:
        decode: (num_decode_tokens,) int32, the row of each decode token, draft tokens among them. Prompts can end in
            one: vLLM runs a last prompt chunk of one token through the decode path.
        prefill_tokens: (num_prefill_tokens,) int32, the row of each prefill token; for layers that run vLLM's kernels.
        prefill_rows: (num_prefills,) int32, the row of each sequence.
        prefill_prompt_tokens: (num_prefills,) int32, how many tokens of each sequence are prompt tokens that may be
            filtered.
        step: the same on the host.
    """

    decode: torch.Tensor | None = None
    prefill_tokens: torch.Tensor | None = None
    prefill_rows: torch.Tensor | None = None
    prefill_prompt_tokens: torch.Tensor | None = None
    step: StepRows | None = None

    def with_decode(self, decode: torch.Tensor | None) -> "FilterRows":
        """The same with other rows of decode tokens; `dataclasses.replace` takes several times as long."""
        return FilterRows(decode, self.prefill_tokens, self.prefill_rows, self.prefill_prompt_tokens, self.step)


@dataclass
class LongMamba1Metadata(Mamba1AttentionMetadata):  # type: ignore[misc]
    """Metadata of a step for Mamba-1 layers. `filter_rows` is None where the engine runs without the filter."""

    filter_rows: FilterRows | None = None


@dataclass
class LongMamba2Metadata(Mamba2AttentionMetadata):  # type: ignore[misc]
    """Metadata of a step for Mamba-2 layers. `filter_rows` is None where the engine runs without the filter.

    Attributes:
        prefill_numbers: (num_prefills,) int64 on the device, 0, 1, 2 and so on: which of our checkpoint states is each
            prompt's. None where no prompt of the step has a checkpoint.
    """

    filter_rows: FilterRows | None = None
    prefill_numbers: torch.Tensor | None = None


class _FilterRowsBuilder:
    """Adds the filter's rows to the metadata of a stock builder, in eager mode and under CUDA graphs."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)  # type: ignore[call-arg]
        layers = vllm_config.compilation_config.static_forward_context
        self._mixer = layers[layer_names[0]]
        # Full CUDA graphs read this buffer at each replay.
        most = self.decode_cudagraph_max_bs * (1 + self.num_spec_tokens)  # type: ignore[attr-defined]
        self._graph_rows = torch.zeros(most, dtype=torch.int32, device=device)
        self._graph_rows_are_zero = True
        # Views of its begin by length: making one takes as long as the rest of a step that filters nothing.
        self._graph_views: dict[int, torch.Tensor] = {}
        self._slot_views: dict[int, torch.Tensor] = {}

    @property
    def prompt_filter(self) -> PromptFilter | None:
        """The layers' own, so that both always hold the same table."""
        prompt_filter: PromptFilter | None = self._mixer.prompt_filter
        return prompt_filter

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False, **kwargs: Any) -> Any:
        """See vLLM's `AttentionMetadataBuilder.build`."""
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build, **kwargs)  # type: ignore[misc]
        if metadata.num_prefills > 0 and self.use_spec_decode:  # type: ignore[attr-defined]
            # The first column of a table with a state for each draft token.
            metadata.state_indices_tensor_p = metadata.state_indices_tensor_p.contiguous()
        if self.prompt_filter is None:
            return metadata
        step = step_rows_from_metadata(self.prompt_filter, common_attn_metadata)
        # Made for this step, so that it can be changed: a copy of all its fields takes longer than everything here.
        metadata.filter_rows = self._filter_rows(metadata, step)
        return metadata

    def update_block_table(self, metadata: Any, blk_table: torch.Tensor, slot_mapping: torch.Tensor) -> Any:
        """See vLLM's builder: the same step's metadata for another group of layers, which has its own graph buffer."""
        if self._writes_slots_only(metadata):
            updated = _shallow_copy(metadata)
            cache_mode = self.vllm_config.cache_config.mamba_cache_mode  # type: ignore[attr-defined]
            slots = mamba_get_block_table_tensor(blk_table, metadata.seq_lens, self.kv_cache_spec, cache_mode)  # type: ignore[attr-defined]
            self._write_slots(updated, slots[:, :1])
        else:
            updated = super().update_block_table(metadata, blk_table, slot_mapping)  # type: ignore[misc]
        rows = metadata.filter_rows
        if rows is not None:
            updated.filter_rows = rows.with_decode(self._decode_rows(metadata, rows.step))
        return updated

    def _update_metadata_for_cudagraph_capture(self, metadata: Any) -> Any:
        """See vLLM's builder. Here without copies of all fields, which a hybrid model's step makes for each group."""
        if not self._writes_slots_only(metadata):
            return super()._update_metadata_for_cudagraph_capture(metadata)  # type: ignore[misc]
        self._write_slots(metadata, metadata.state_indices_tensor_d)
        return metadata

    def _write_slots(self, metadata: Any, given: torch.Tensor) -> None:
        """Writes slots (num_decodes, 1) into the buffer that graphs read, and hands its begin on as this step's."""
        slots = self._slot_views.get(metadata.num_reqs)
        if slots is None:
            slots = self._slot_views[metadata.num_reqs] = self.state_indices_tensor_d[: metadata.num_reqs]  # type: ignore[attr-defined]
        if metadata.num_reqs == metadata.num_decodes:
            slots.copy_(given, non_blocking=True)
        else:
            slots[: metadata.num_decodes].copy_(given, non_blocking=True)
            slots[metadata.num_decodes :] = NULL_BLOCK_ID
        metadata.state_indices_tensor_d = slots

    def _writes_slots_only(self, metadata: Any) -> bool:
        """Whether the slots of the states are all that a captured graph reads of a step, besides its rows."""
        return (
            self._may_replay_graph(metadata)
            and not (self.use_spec_decode or self.use_replayssm or self.use_flashinfer_replayssm)  # type: ignore[attr-defined]
            and getattr(metadata, "checkpoint_meta", None) is None
        )

    def _filter_rows(self, metadata: Any, step: StepRows) -> FilterRows:
        rows = FilterRows(decode=self._decode_rows(metadata, step), step=step)
        if metadata.num_prefills > 0:
            prefills = step[metadata.num_decodes : metadata.num_decodes + metadata.num_prefills]
            # Also where all are 0: the kernels that filter are then compiled while the engine starts.
            rows.prefill_rows = self._to_device(prefills.rows)
            rows.prefill_prompt_tokens = self._to_device(prefills.prompt_tokens)
            if prefills.filters and not self._mixer.runs_own_kernels():
                rows.prefill_tokens = self._to_device(prefills.per_token())
        return rows

    def _decode_rows(self, metadata: Any, step: StepRows) -> torch.Tensor | None:
        replays = self._may_replay_graph(metadata)
        if step.filters or not self._graph_rows_are_zero:
            decodes = step[: metadata.num_decodes]
            # One token each, where there are no draft tokens.
            token_rows = decodes.per_token() if self.use_spec_decode else decodes.rows  # type: ignore[attr-defined]
            if not replays:
                return self._to_device(token_rows) if decodes.filters else None
            self._graph_rows.zero_()
            self._graph_rows[: len(token_rows)].copy_(self._to_device(token_rows), non_blocking=True)
            self._graph_rows_are_zero = not decodes.filters
        return self._graph_view(metadata.num_decode_tokens) if replays else None

    def _graph_view(self, length: int) -> torch.Tensor:
        view = self._graph_views.get(length)
        if view is None:
            view = self._graph_views[length] = self._graph_rows[:length]
        return view

    def _may_replay_graph(self, metadata: Any) -> bool:
        return bool(
            metadata.num_prefills == 0
            and metadata.num_decodes <= self.decode_cudagraph_max_bs  # type: ignore[attr-defined]
            and self.compilation_config.cudagraph_mode.has_full_cudagraphs()  # type: ignore[attr-defined]
        )

    def _to_device(self, values: np.ndarray[Any, np.dtype[np.int32]]) -> torch.Tensor:
        values = np.ascontiguousarray(values)
        on_device: torch.Tensor = async_tensor_h2d(values, dtype=torch.int32, device=self._graph_rows.device)
        return on_device


def _shallow_copy(metadata: Any) -> Any:
    """`copy.copy` and `dataclasses.replace` take several times as long."""
    copied = object.__new__(type(metadata))
    copied.__dict__.update(metadata.__dict__)
    return copied


class LongMamba1MetadataBuilder(_FilterRowsBuilder, Mamba1AttentionMetadataBuilder):  # type: ignore[misc]
    """Builder for Mamba-1 layers."""

    metadata_cls = LongMamba1Metadata


class LongMamba2MetadataBuilder(_FilterRowsBuilder, Mamba2AttentionMetadataBuilder):  # type: ignore[misc]
    """Builder for Mamba-2 layers."""

    metadata_cls = LongMamba2Metadata

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._numbers = torch.arange(vllm_config.scheduler_config.max_num_seqs, device=device)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False, **kwargs: Any) -> Any:
        """See vLLM's `AttentionMetadataBuilder.build`."""
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build, **kwargs)
        if metadata.checkpoint_chunk_idx is not None:
            metadata.prefill_numbers = self._numbers[: metadata.num_prefills]
        return metadata


class LongMamba1Backend(Mamba1AttentionBackend):  # type: ignore[misc]
    """Names the builder for Mamba-1 layers."""

    @staticmethod
    def get_builder_cls() -> type[LongMamba1MetadataBuilder]:
        return LongMamba1MetadataBuilder


class LongMamba2Backend(Mamba2AttentionBackend):  # type: ignore[misc]
    """Names the builder for Mamba-2 layers."""

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        """No: the rows of draft tokens are laid out on the host, and adaptive verification drops some on the device."""
        return False

    @staticmethod
    def get_builder_cls() -> type[LongMamba2MetadataBuilder]:
        return LongMamba2MetadataBuilder
