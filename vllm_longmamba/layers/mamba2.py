"""vLLM's Mamba-2 mixer with the filter: in this project's kernels on a GPU, in front of vLLM's elsewhere."""

from copy import copy
from typing import Any

import torch
from vllm.config.mamba import MambaBackendEnum
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.mamba_mixer import mamba_mixer  # noqa: F401 - registers torch.ops.vllm.mamba_mixer
from vllm.model_executor.layers.mamba.mamba_mixer2 import MambaMixer2
from vllm.model_executor.layers.mamba.ops.ssd_checkpoint import store_prefill_checkpoint
from vllm.model_executor.layers.mamba.ops.ssd_combined import mamba_chunk_scan_combined_varlen
from vllm.model_executor.layers.mamba.ops.ssu_dispatch import reset_replayssm_ring_trackers
from vllm.utils.torch_utils import _encode_layer_name

from vllm_longmamba.kernels import compile_ahead, filter_dt_, ssd, ssd_supports
from vllm_longmamba.layers.filtered_mixer import FilteredMixer
from vllm_longmamba.layers.projections import GatedNorm, compile_product, plain_weight, project
from vllm_longmamba.layers.step_metadata import FilterRows, LongMamba2Backend


class LongMambaMixer2(FilteredMixer, MambaMixer2):  # type: ignore[misc]
    """Mamba-2 mixer that filters. In front of vLLM's kernels, a raw dt of -inf does it: softplus(-inf) is exactly 0."""

    def get_attn_backend(self) -> type[LongMamba2Backend]:
        """See vLLM's `MambaBase`."""
        return LongMamba2Backend

    def get_kv_cache_spec(self, vllm_config: Any) -> Any:
        """See vLLM's `MambaBase`. On a CPU, prefills end at the blocks of the prefix cache, as they do for Mamba-1.

        Elsewhere vLLM takes the state of a block's end from within a prefill, which its CPU scan does not return.
        """
        if self.A.device.type == "cpu":
            return super(MambaMixer2, self).get_kv_cache_spec(vllm_config)
        return super().get_kv_cache_spec(vllm_config)

    def forward(self, hidden_states: torch.Tensor, mup_vector: torch.Tensor | None = None) -> torch.Tensor:
        """See vLLM's `MambaMixer2`. Where its compiler has nothing to do in the layer, the layer is one operation.

        Args:
            hidden_states: (tokens, d_model).
            mup_vector: (gate + x + B + C + dt,), or None.
        """
        if mup_vector is None and self._is_one_operation():
            return self._run_whole(hidden_states)
        output: torch.Tensor = super().forward(hidden_states, mup_vector)
        return output

    def _run_whole(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`forward_impl` as an operation that vLLM's compiler does not look into, that of its Mamba-1 mixer."""
        output = torch.empty_like(hidden_states)
        torch.ops.vllm.mamba_mixer(hidden_states, output, _encode_layer_name(self.prefix))
        return output

    def _is_one_operation(self) -> bool:
        """Whether both projections are plain products, and the norm between them has a kernel of this project."""
        is_plain = plain_weight(self.in_proj) is not None and plain_weight(self.out_proj) is not None
        return is_plain and self._has_norm_kernel()

    def forward_impl(self, hidden_states: torch.Tensor, output: torch.Tensor) -> Any:
        """Run the layer on a batch of decode tokens followed by prefill tokens.

        Args:
            hidden_states: (tokens, d_model).
            output: (tokens, d_model), written in place.
        """
        projected = project(self.in_proj, hidden_states)
        scanned = self._empty_scanned(projected)
        self.conv_ssm_forward(projected, scanned)
        self._project_out(scanned, projected, output)
        return None

    def _warmup_ssd_kernels(self, projected_states: torch.Tensor) -> None:
        """See vLLM's `MambaMixer2`; to try launch sizes of its SSD kernels takes long, and they may not be needed."""
        if not (self.runs_own_kernels() and self._has_own_ssd):
            super()._warmup_ssd_kernels(projected_states)

    def _empty_scanned(self, projected: torch.Tensor) -> torch.Tensor:
        shape = (projected.shape[0], self.tped_intermediate_size)
        return torch.empty(shape, dtype=projected.dtype, device=projected.device)

    def _has_norm_kernel(self) -> bool:
        """Whether the gated norm has a kernel of its own: on a GPU, over all channels of one rank."""
        return bool(self.A.is_cuda and self.use_rms_norm and self.norm.n_groups == 1 and self.tp_size == 1)

    def _project_out(self, scanned: torch.Tensor, projected: torch.Tensor, out: torch.Tensor) -> None:
        """Gate, norm and the layer's last projection, where `_has_norm_kernel`.

        Args:
            scanned: (tokens, d_inner).
            projected: (tokens, gate + x + B + C + dt).
            out: (tokens, d_model), written in place.
        """
        project(self.out_proj, scanned, out, self._gated_norm(projected), check=self._is_first_prefill)

    def _gated_norm(self, projected: torch.Tensor) -> GatedNorm:
        gate = projected[:, : self.tped_intermediate_size]
        return GatedNorm(gate, self.norm.weight, self.norm.variance_epsilon)

    def _compile_products(self, slots: torch.Tensor) -> None:
        compile_product(self.in_proj)
        if self._has_norm_kernel():
            projected = self.norm.weight.new_empty((1, self.in_proj.output_size_per_partition))
            compile_product(self.out_proj, self._gated_norm(projected))

    def conv_ssm_forward(self, projected_states: torch.Tensor, output: torch.Tensor) -> Any:
        """Run the convolution and the SSM on a batch of decode tokens followed by prefill tokens.

        Args:
            projected_states: (tokens, gate + x + B + C + dt), changed in place except for the gate; nothing reads the
                rest afterwards.
            output: (tokens, d_inner), written in place.
        """
        metadata = (get_forward_context().attn_metadata or {}).get(self.prefix)
        if metadata is None:
            return super().conv_ssm_forward(projected_states, output)
        decodes, tokens = metadata.num_decode_tokens, metadata.num_decode_tokens + metadata.num_prefill_tokens
        sizes = [self.tped_intermediate_size, self.tped_conv_size, self.tped_dt_size]
        _, x_B_C, dt = torch.split(projected_states[:tokens], sizes, dim=-1)
        rows = metadata.filter_rows or FilterRows()
        self._record_dt(dt[decodes:], self.dt_bias)
        if not self.runs_own_kernels():
            self._filter(dt[:decodes], rows.decode)
            self._filter(dt[decodes:], rows.prefill_tokens)
            return super().conv_ssm_forward(projected_states, output)
        if decodes > 0 and self._updates_state:
            self._decode(x_B_C[:decodes], dt[:decodes], metadata, rows, output[:decodes])
        elif decodes > 0:
            self._filter(dt[:decodes], rows.decode)
            self._decode_by_vllm(projected_states[:decodes], metadata, output[:decodes])
        if tokens > decodes:
            self._prefill(x_B_C[decodes:], dt[decodes:], metadata, rows, output[decodes:tokens])
        return None

    def _filter(self, dt: torch.Tensor, token_rows: torch.Tensor | None) -> None:
        """In front of vLLM's kernels."""
        if token_rows is not None:
            filter_dt_(dt, self.dt_bias, self.dt_threshold, token_rows)

    def _decode_by_vllm(self, projected_states: torch.Tensor, metadata: Any, out: torch.Tensor) -> None:
        """With draft tokens, rings of tokens or another state update, whose states only vLLM knows."""
        only_decodes = copy(metadata)
        only_decodes.num_prefills = only_decodes.num_prefill_tokens = 0
        with self._step(only_decodes):
            super().conv_ssm_forward(projected_states, out)

    def _decode(
        self, x_B_C: torch.Tensor, dt: torch.Tensor, metadata: Any, rows: FilterRows, out: torch.Tensor
    ) -> None:
        x, B, C = self.split_hidden_states_B_C_fn(self._convolve_decodes(x_B_C, metadata))
        self._run_decode(
            rows.decode,
            state=self.kv_cache[1].view(len(self.kv_cache[1]), -1, self.ssm_state_size),
            **self._recurrence(x, dt, B, C),
            z=None,
            dt_bias=self.dt_bias,
            state_indices=metadata.state_indices_tensor_d[:, 0],
            out=out,
        )

    def _prefill(
        self, x_B_C: torch.Tensor, dt: torch.Tensor, metadata: Any, rows: FilterRows, out: torch.Tensor
    ) -> None:
        """Convolution and SSM of prompts."""
        if self._has_own_ssd:
            has_checkpoints = metadata.checkpoint_chunk_idx is not None
            states = self._empty_states(metadata.num_prefills, dt.device) if has_checkpoints else None
            self._ssd(self._convolve_prompts(x_B_C, metadata), dt, metadata, rows, out, states)
            if states is not None:
                self._store_checkpoints(x_B_C, states, metadata.prefill_numbers, metadata)
        else:
            self._prefill_by_vllm(x_B_C, dt, metadata, rows, out)
        if self._empties_rings:
            reset_replayssm_ring_trackers(
                self._replayssm_ring_start,
                self._replayssm_prev_num_accepted,
                self._replayssm_prev_query_len,
                metadata.state_indices_tensor_p,
            )

    @property
    def _empties_rings(self) -> bool:
        """Whether a prompt empties rings of tokens that FlashInfer keeps, as in vLLM's `conv_ssm_forward`."""
        is_flashinfer = self.mamba_config.backend == MambaBackendEnum.FLASHINFER
        return bool(self.use_replayssm and is_flashinfer and self._updates_replayssm_trackers)

    @property
    def _has_own_ssd(self) -> bool:
        return bool(ssd_supports(self.head_dim, self.ssm_state_size))

    def _ssd(
        self,
        convolved: torch.Tensor,
        dt: torch.Tensor,
        metadata: Any,
        rows: FilterRows,
        out: torch.Tensor,
        checkpoint_states: torch.Tensor | None = None,
    ) -> None:
        """Writes checkpoint_states, (num_prefills, nheads, headdim, d_state), where given: for `_store_checkpoints`."""
        x, B, C = self.split_hidden_states_B_C_fn(convolved)
        tokens, is_filtered = dt.shape[0], rows.prefill_rows is not None
        arguments = {
            **self._recurrence(
                x.view(tokens, -1, self.head_dim),
                dt,
                B.view(tokens, -1, self.ssm_state_size),
                C.view(tokens, -1, self.ssm_state_size),
            ),
            "dt_bias": self.dt_bias,
            "state": self.kv_cache[1],
            "query_start_loc": metadata.query_start_loc_p,
            "state_indices": metadata.state_indices_tensor_p,
            "has_initial_state": metadata.has_initial_states_p,
            "dt_threshold": self.dt_threshold if is_filtered else None,
            "seq_rows": rows.prefill_rows,
            "seq_prompt_tokens": rows.prefill_prompt_tokens,
            "out": out.view(tokens, -1, self.head_dim),
        }
        if checkpoint_states is not None:
            offsets = metadata.checkpoint_meta.checkpoint_offsets
            arguments |= {"checkpoints": offsets, "checkpoint_state": checkpoint_states}
        elif self._most_prompt_tokens is not None and self.cache_config.mamba_cache_mode == "align":
            # There are none in vLLM's warm-up, but later.
            some = torch.empty(metadata.num_prefills, dtype=torch.int32, device="meta")
            later = {"checkpoints": some, "checkpoint_state": self._empty_states(len(some), some.device)}
            compile_ahead(ssd, arguments | later, self._most_prompt_tokens)
        self._run_prefill(ssd, **arguments)

    def _empty_states(self, number: int, device: torch.device) -> torch.Tensor:
        state = self.kv_cache[1]
        return torch.empty((number, *state.shape[1:]), dtype=state.dtype, device=device)

    def _store_checkpoints(
        self, x_B_C: torch.Tensor, states: torch.Tensor, indices: torch.Tensor, metadata: Any
    ) -> None:
        """Put the states that the prefix cache keeps from within prompts into the blocks that it has for them.

        Args:
            x_B_C: (tokens, x + B + C), what went into the convolution.
            states: (states, nheads, headdim, d_state).
            indices: (num_prefills,) int64, which of the states is each prompt's; any where the cache keeps none.
            metadata: of the step.
        """
        store_prefill_checkpoint(
            metadata.checkpoint_meta,
            indices,
            x_B_C.transpose(0, 1),
            self._conv_state(),
            states,
            self.kv_cache[1],
            metadata.query_start_loc_p,
            state_len=self.conv_kernel_size - 1,
        )

    def _prefill_by_vllm(
        self, x_B_C: torch.Tensor, dt: torch.Tensor, metadata: Any, rows: FilterRows, out: torch.Tensor
    ) -> None:
        """Convolution and filter in one launch, then vLLM's SSD kernels, as in its `conv_ssm_forward`.

        For shapes that our kernels do not take.
        """
        state, slots = self.kv_cache[1], metadata.state_indices_tensor_p
        filters: dict[str, torch.Tensor | None] = {}
        if rows.prefill_rows is not None:
            filters = {"dt": dt, "dt_bias": self.dt_bias, "dt_threshold": self.dt_threshold}
            filters |= {"seq_rows": rows.prefill_rows, "seq_prompt_tokens": rows.prefill_prompt_tokens}
        convolved = self._convolve_prompts(x_B_C, metadata, **filters)
        states = self._ssd_by_vllm(convolved, dt, metadata, out)
        if metadata.checkpoint_chunk_idx is not None:
            self._store_checkpoints(x_B_C, states, metadata.checkpoint_chunk_idx, metadata)
            states = states[metadata.last_chunk_indices_p]
        state[slots] = states

    def _ssd_by_vllm(self, convolved: torch.Tensor, dt: torch.Tensor, metadata: Any, out: torch.Tensor) -> torch.Tensor:
        """Returns the last state of each prompt, or those of all chunks where the prefix cache keeps some."""
        state, slots = self.kv_cache[1], metadata.state_indices_tensor_p
        x, B, C = self.split_hidden_states_B_C_fn(convolved)
        initial_states = None
        if metadata.has_initial_states_p is not None and metadata.prep_initial_states:
            initial_states = torch.where(metadata.has_initial_states_p[:, None, None, None], state[slots], 0)
        states: torch.Tensor = mamba_chunk_scan_combined_varlen(
            x.view(len(dt), -1, self.head_dim),
            dt,
            self.A,
            B.view(len(dt), -1, self.ssm_state_size),
            C.view(len(dt), -1, self.ssm_state_size),
            chunk_size=metadata.chunk_size,
            D=self.D,
            dt_bias=self.dt_bias,
            seq_idx=metadata.seq_idx_p,
            cu_seqlens=metadata.query_start_loc_p,
            cu_chunk_seqlens=metadata.cu_chunk_seqlen_p,
            last_chunk_indices=metadata.last_chunk_indices_p,
            initial_states=initial_states,
            return_intermediate_states=metadata.checkpoint_chunk_idx is not None,
            dt_softplus=True,
            out=out.view(len(dt), -1, self.head_dim),
            state_dtype=state.dtype,
        )
        return states
