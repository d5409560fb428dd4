"""vLLM's Mamba-1 mixer with the filter, on tensors that stay tokens-major."""

from typing import Any

import torch
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.mamba_mixer import MambaMixer
from vllm.model_executor.layers.mamba.ops.causal_conv1d import causal_conv1d_fn
from vllm.model_executor.layers.mamba.ops.ssu_dispatch import selective_state_update as vllm_selective_state_update

from vllm_longmamba.kernels import MOST_PROJECTED, compile_ahead, filter_dt_, norm_parts_, selective_scan
from vllm_longmamba.layers.filtered_mixer import FilteredMixer
from vllm_longmamba.layers.projections import compile_product, is_small, project, unquantized_weight
from vllm_longmamba.layers.step_metadata import FilterRows, LongMamba1Backend


class LongMambaMixer(FilteredMixer, MambaMixer):  # type: ignore[misc]
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
            # vLLM's profile and warm-up runs. Stock's own path there does not know the weights that it packs on CPUs.
            x, _ = self.in_proj(hidden_states)[0].chunk(2, dim=-1)
            project(self.out_proj, x.contiguous(), output)
            return None
        num_decodes, num_prefills = metadata.num_decode_tokens, metadata.num_prefill_tokens
        tokens = num_decodes + num_prefills
        convolves = num_prefills == 0 and self._convolves_in_projection(num_decodes)
        convolution = self._decode_convolution(metadata.state_indices_tensor_d[:, 0]) if convolves else {}
        x, z = project(self.in_proj, hidden_states[:tokens], **convolution).chunk(2, dim=-1)
        rows = metadata.filter_rows or FilterRows()
        scanned = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if num_decodes > 0:
            convolved = x if convolves else self._convolve_decodes(x[:num_decodes], metadata)
            self._decode(convolved, z[:num_decodes], metadata, rows, scanned[:num_decodes])
        if num_prefills > 0:
            self._prefill(x[num_decodes:], z[num_decodes:], metadata, rows, scanned[num_decodes:])
        project(self.out_proj, scanned, output[:tokens])
        return None

    def _convolves_in_projection(self, decodes: int) -> bool:
        """Whether a step of so many decode tokens and no prompts has the convolution in the launch of in_proj."""
        return self._runs_own_decodes and is_small(self.in_proj, decodes)

    def _prefill(self, x: torch.Tensor, z: torch.Tensor, metadata: Any, rows: FilterRows, out: torch.Tensor) -> None:
        if self.runs_own_kernels():
            x = self._convolve_prompts(x, metadata)
        else:
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
        where = (metadata.query_start_loc_p, metadata.state_indices_tensor_p, metadata.has_initial_states_p)
        self._scan(x, dt, B, C, z, where, rows.prefill_rows, rows.prefill_prompt_tokens, out)

    def _scan(
        self,
        x: torch.Tensor,
        dt: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        z: torch.Tensor,
        where: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        seq_rows: torch.Tensor | None,
        seq_prompt_tokens: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        query_start_loc, state_indices, has_initial_state = where
        self._run_prefill(
            selective_scan,
            **self._recurrence(x, dt, B, C),
            z=z,
            dt_bias=self.dt_proj.bias,
            state=self.kv_cache[1],
            query_start_loc=query_start_loc,
            state_indices=state_indices,
            has_initial_state=has_initial_state,
            dt_threshold=self.dt_threshold if seq_rows is not None else None,
            seq_rows=seq_rows,
            seq_prompt_tokens=seq_prompt_tokens,
            out=out,
        )

    def _decode(self, x: torch.Tensor, z: torch.Tensor, metadata: Any, rows: FilterRows, out: torch.Tensor) -> None:
        states, state, dt_bias = metadata.state_indices_tensor_d, self.kv_cache[1], self.dt_proj.bias
        if self._runs_own_decodes:
            self._update(x, z, states[:, 0], rows.decode, out)
            return
        dt, B, C = self._dt_B_C(x)
        if not self.runs_own_kernels():
            # Sequences of one token: vLLM's CPU update is for Mamba-2's heads only.
            starts = torch.arange(x.shape[0] + 1, dtype=torch.int32)
            where = (starts, states.flatten(), torch.ones(x.shape[0], dtype=torch.bool))
            prompt_tokens = (rows.decode > 0).int() if rows.decode is not None else None
            self._scan(x, dt, B, C, z, where, rows.decode, prompt_tokens, out)
            return
        if rows.decode is not None:
            filter_dt_(dt, dt_bias, self.dt_threshold, rows.decode)
        vllm_selective_state_update(
            state,
            x,
            dt,
            self.A,
            B,
            C,
            self.D,
            dt_bias.float(),
            z=z,
            dt_softplus=True,
            state_batch_indices=states,
            dst_state_batch_indices=states,
            out=out,
        )

    def _update(
        self, x: torch.Tensor, z: torch.Tensor, slots: torch.Tensor, token_rows: torch.Tensor | None, out: torch.Tensor
    ) -> None:
        """Everything between convolution and out_proj; for few sequences, dt_proj in the launch of the update."""
        dt_weight = self._dt_weight()

        def arguments(projects_dt: bool) -> dict[str, Any]:
            dt, B, C = self._low_rank_dt_B_C(x) if projects_dt else self._dt_B_C(x)
            where = {"state": self.kv_cache[1], "state_indices": slots, "out": out}
            weight = dt_weight if projects_dt else None
            bias = self.dt_proj.bias
            return {**self._recurrence(x, dt, B, C), "z": z, "dt_bias": bias, "dt_weight": weight, **where}

        projects_dt = dt_weight is not None and x.numel() <= MOST_PROJECTED
        if dt_weight is not None and self._most_decodes is not None:
            # vLLM's warm-up; the way that this batch does not take.
            self._compile_decode(arguments(not projects_dt), self._most_decodes)
        self._run_decode(token_rows, **arguments(projects_dt))

    def _dt_B_C(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # noqa: N802
        weight = self._dt_weight()
        # Of tensors that are parts of others, vLLM knows products on AMD's GPUs to be wrong.
        if weight is not None and torch.version.hip is None:
            dt, B, C = self._low_rank_dt_B_C(x)
            return torch.mm(dt, weight.t()), B, C
        dt, B, C = self._ssm_transform(x)
        return dt.transpose(-2, -1), B, C

    def _dt_weight(self) -> torch.Tensor | None:
        """That of dt_proj, where it can be multiplied by as it is; its bias is the kernels'."""
        weight = None if self.is_lora_enabled else unquantized_weight(self.dt_proj)
        return None if weight is None else weight.data

    def _compile_products(self, slots: torch.Tensor) -> None:
        compile_product(self.in_proj, **self._decode_convolution(slots))
        compile_product(self.x_proj)
        compile_product(self.out_proj)

    def _low_rank_dt_B_C(self, x: torch.Tensor) -> list[torch.Tensor]:  # noqa: N802
        """What vLLM's `_ssm_transform` has in front of dt_proj."""
        sizes = [self.time_step_rank, self.ssm_state_size, self.ssm_state_size]
        projected = project(self.x_proj, x)
        parts = list(torch.split(projected, sizes, dim=-1))
        if not self.use_rms_norm:
            return parts
        norms = (self.dt_layernorm, self.b_layernorm, self.c_layernorm)
        if self.runs_own_kernels():
            self._norm_parts(projected, norms)
            return parts
        return [norm(part.contiguous()) for norm, part in zip(norms, parts, strict=True)]

    def _norm_parts(self, projected: torch.Tensor, norms: tuple[Any, Any, Any]) -> None:
        """Norm dt, B and C, which lie side by side in (tokens, features), in place."""
        weights = [norm.weight.data if norm.has_weight else None for norm in norms]
        arguments = {"x": projected, "rank": self.time_step_rank, "eps": norms[0].variance_epsilon}
        arguments |= dict(zip(("dt_weight", "B_weight", "C_weight"), weights, strict=True))
        if self._most_prompt_tokens is not None:
            compile_ahead(norm_parts_, arguments, self._most_prompt_tokens)
        norm_parts_(**arguments, check=self._is_first_prefill)
