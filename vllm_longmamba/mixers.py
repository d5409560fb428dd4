"""vLLM's Mamba mixers with the filter: prompt tokens with a dt up to the threshold leave a global channel alone."""

from typing import Any, Protocol

import torch
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.mamba_mixer import MambaMixer
from vllm.model_executor.layers.mamba.mamba_mixer2 import MambaMixer2
from vllm.model_executor.layers.mamba.mamba_utils import is_conv_state_dim_first
from vllm.model_executor.layers.mamba.ops.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from vllm.model_executor.layers.mamba.ops.ssu_dispatch import selective_state_update

from vllm_longmamba.kernels import filter_dt_, filtered_scan
from vllm_longmamba.metadata import FilterRows, LongMamba1Backend, LongMamba2Backend
from vllm_longmamba.prompt_filter import PromptFilter


class DtRecorder(Protocol):
    """Receives the steps of a layer while the model is calibrated."""

    def record(self, layer_index: int, dt: torch.Tensor) -> None:
        """Take dt (tokens, channels) float32 of one prompt: softplus(dt_raw + dt_bias)."""


class LongMixer:
    """What the LongMamba variants of both mixers share.

    Attributes:
        prompt_filter: the model's filter, None where the engine runs without it.
        dt_threshold: (rows, channels) float32 on the device, this rank's channels of this layer; None likewise.
        dt_recorder: set while the model is calibrated.
        layer_index: number of the model's layer, by which the threshold table knows it.
    """

    prompt_filter: PromptFilter | None = None
    dt_threshold: torch.Tensor | None = None
    dt_recorder: DtRecorder | None = None
    layer_index: int
    prefix: str
    A: torch.nn.Parameter

    def set_filter(self, prompt_filter: PromptFilter, tp_rank: int, tp_size: int) -> None:
        """Put this layer's thresholds on the device of its parameters.

        Args:
            prompt_filter: the model's filter.
            tp_rank: tensor-parallel rank; rank r holds the r-th of `tp_size` equal slices of the channels.
            tp_size: tensor-parallel degree.

        Raises:
            ValueError: the table has not this layer, or another number of channels.
        """
        layers = prompt_filter.table.layers
        if self.layer_index not in layers:
            raise ValueError(
                f"the threshold table has no layer {self.layer_index} ({self.prefix}); it was made for another model "
                f"({prompt_filter.table.metadata.model_id!r}), make one with `longmamba calibrate`"
            )
        channels = self.A.shape[0]
        thresholds = prompt_filter.table.thresholds(self.layer_index, prompt_filter.min_retention)
        if thresholds.shape[1] != channels * tp_size:
            raise ValueError(
                f"the threshold table has {thresholds.shape[1]} channels in layer {self.layer_index}, but the model "
                f"has {channels * tp_size}; it was made for another model ({prompt_filter.table.metadata.model_id!r}), "
                "make one with `longmamba calibrate`"
            )
        mine = thresholds[:, tp_rank * channels : (tp_rank + 1) * channels]
        self.dt_threshold = mine.to(device=self.A.device, dtype=torch.float32).contiguous()
        self.prompt_filter = prompt_filter

    def _record_dt(self, dt: torch.Tensor, dt_bias: torch.Tensor) -> None:
        if self.dt_recorder is not None:
            self.dt_recorder.record(self.layer_index, torch.nn.functional.softplus(dt.float() + dt_bias.float()))


class LongMambaMixer(LongMixer, MambaMixer):  # type: ignore[misc]
    """Mamba-1 mixer whose scan filters, on tensors that stay (tokens, channels) from one projection to the next."""

    def get_attn_backend(self) -> type[LongMamba1Backend]:
        """See vLLM's `MambaBase`."""
        return LongMamba1Backend

    def forward_impl(self, hidden_states: torch.Tensor, output: torch.Tensor) -> Any:
        """Run the layer on a batch of decode tokens followed by prefill tokens.

        Args:
            hidden_states: (tokens, d_model).
            output: (tokens, d_model), written in place; rows of padding are left as they are.
        """
        metadata = (get_forward_context().attn_metadata or {}).get(self.prefix)
        if metadata is None:
            # vLLM's profile run.
            return super().forward_impl(hidden_states, output)
        num_decodes, num_prefills = metadata.num_decode_tokens, metadata.num_prefill_tokens
        tokens = num_decodes + num_prefills
        x, z = self.in_proj(hidden_states[:tokens])[0].chunk(2, dim=-1)
        rows = metadata.filter_rows or FilterRows()
        scanned = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if num_decodes > 0:
            self._decode(x[:num_decodes], z[:num_decodes], metadata, rows, scanned[:num_decodes])
        if num_prefills > 0:
            self._prefill(x[num_decodes:], z[num_decodes:], metadata, rows, scanned[num_decodes:])
        output[:tokens] = self.out_proj(scanned)[0]
        return None

    def _prefill(self, x: torch.Tensor, z: torch.Tensor, metadata: Any, rows: FilterRows, out: torch.Tensor) -> None:
        x = causal_conv1d_fn(
            x.transpose(0, 1),
            self._conv_weights(),
            self.conv1d.bias,
            activation=self.activation,
            conv_states=self._conv_state(),
            has_initial_state=metadata.has_initial_states_p,
            cache_indices=metadata.state_indices_tensor_p,
            query_start_loc=metadata.query_start_loc_p,
            metadata=metadata,
        ).transpose(0, 1)
        dt, B, C = self._dt_B_C(x)
        self._record_dt(dt, self.dt_proj.bias)
        self._scan(
            x,
            dt,
            B,
            C,
            z,
            metadata.query_start_loc_p,
            metadata.state_indices_tensor_p,
            metadata.has_initial_states_p,
            rows.prefill_rows,
            rows.prefill_prompt_tokens,
            out,
        )

    def _scan(
        self,
        x: torch.Tensor,
        dt: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        z: torch.Tensor,
        query_start_loc: torch.Tensor,
        state_indices: torch.Tensor,
        has_initial_state: torch.Tensor,
        seq_rows: torch.Tensor | None,
        seq_prompt_tokens: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        filtered_scan(
            x,
            dt,
            self.A,
            B,
            C,
            self.D.float(),
            z,
            self._time_proj_bias(),
            self.kv_cache[1],
            query_start_loc,
            state_indices,
            has_initial_state,
            dt_threshold=self.dt_threshold if seq_rows is not None else None,
            seq_rows=seq_rows,
            seq_prompt_tokens=seq_prompt_tokens,
            out=out,
        )

    def _decode(self, x: torch.Tensor, z: torch.Tensor, metadata: Any, rows: FilterRows, out: torch.Tensor) -> None:
        states = metadata.state_indices_tensor_d
        x = causal_conv1d_update(
            x, self._conv_state(), self._conv_weights(), self.conv1d.bias, self.activation, conv_state_indices=states
        )
        dt, B, C = self._dt_B_C(x)
        if x.device.type == "cpu":
            self._decode_on_cpu(x, dt, B, C, z, states, rows.decode, out)
            return
        dt_bias = self._time_proj_bias()
        if rows.decode is not None and self.dt_threshold is not None:
            filter_dt_(dt, dt_bias, self.dt_threshold, rows.decode)
        selective_state_update(
            self.kv_cache[1],
            x,
            dt,
            self.A,
            B,
            C,
            self.D,
            dt_bias,
            z=z,
            dt_softplus=True,
            state_batch_indices=states,
            dst_state_batch_indices=states,
            out=out,
        )

    def _decode_on_cpu(
        self,
        x: torch.Tensor,
        dt: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        z: torch.Tensor,
        states: torch.Tensor,
        decode_rows: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        """Decode as sequences of one token: vLLM's CPU update is for Mamba-2's heads only."""
        self._scan(
            x,
            dt,
            B,
            C,
            z,
            torch.arange(x.shape[0] + 1, dtype=torch.int32),
            states.flatten(),
            torch.ones(x.shape[0], dtype=torch.bool),
            decode_rows,
            (decode_rows > 0).int() if decode_rows is not None else None,
            out,
        )

    def _dt_B_C(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # noqa: N802
        dt, B, C = self._ssm_transform(x)
        return dt.transpose(-2, -1), B, C

    def _conv_weights(self) -> torch.Tensor:
        return self.conv1d.weight.view(self.conv1d.weight.size(0), self.conv1d.weight.size(2))  # type: ignore[no-any-return]

    def _conv_state(self) -> torch.Tensor:
        state: torch.Tensor = self.kv_cache[0]
        return state if is_conv_state_dim_first() else state.transpose(-1, -2)


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
        if metadata is not None:
            decodes, tokens = metadata.num_decode_tokens, metadata.num_decode_tokens + metadata.num_prefill_tokens
            dt = projected_states[:, -self.tped_dt_size :]
            self._record_dt(dt[decodes:tokens], self.dt_bias)
            if metadata.filter_rows is not None:
                self._filter(dt[:decodes], metadata.filter_rows.decode)
                self._filter(dt[decodes:tokens], metadata.filter_rows.prefill_tokens)
        return super().conv_ssm_forward(projected_states, output)

    def _filter(self, dt: torch.Tensor, token_rows: torch.Tensor | None) -> None:
        if token_rows is not None and self.dt_threshold is not None:
            filter_dt_(dt, self.dt_bias, self.dt_threshold, token_rows)
