"""vLLM's Mamba-2 mixer with the filter, on vLLM's SSD kernels: a raw dt of -inf makes softplus exactly 0 there."""

from typing import Any

import torch
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.mamba_mixer2 import MambaMixer2

from vllm_longmamba.kernels import filter_dt_
from vllm_longmamba.metadata import FilterRows, LongMamba2Backend
from vllm_longmamba.mixers import LongMixer


class LongMambaMixer2(LongMixer, MambaMixer2):  # type: ignore[misc]
    """Mamba-2 mixer that filters the raw dt in front of vLLM's own kernels: softplus(-inf) is exactly 0."""

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

    def conv_ssm_forward(self, projected_states: torch.Tensor, output: torch.Tensor) -> Any:
        """Filter, then run vLLM's convolution and SSM on a batch of decode tokens followed by prefill tokens.

        Args:
            projected_states: (tokens, gate + x + B + C + dt), whose last columns, the raw dt, are changed in place;
                nothing reads them afterwards.
            output: (tokens, d_inner), written in place.
        """
        metadata = (get_forward_context().attn_metadata or {}).get(self.prefix)
        if metadata is None:
            return super().conv_ssm_forward(projected_states, output)
        decodes, tokens = metadata.num_decode_tokens, metadata.num_decode_tokens + metadata.num_prefill_tokens
        dt = projected_states[:tokens, -self.tped_dt_size :]
        rows = metadata.filter_rows or FilterRows()
        self._record_dt(dt[decodes:], self.dt_bias)
        # softplus(-inf) is exactly 0 in vLLM's kernels.
        if rows.decode is not None:
            filter_dt_(dt[:decodes], self.dt_bias, self.dt_threshold, rows.decode)
        if rows.prefill_tokens is not None:
            filter_dt_(dt[decodes:], self.dt_bias, self.dt_threshold, rows.prefill_tokens)
        return super().conv_ssm_forward(projected_states, output)
