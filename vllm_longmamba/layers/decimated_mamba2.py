"""The Mamba-2 mixer of DeciMamba."""

from copy import copy

import torch

from vllm_longmamba.layers.decimated_metadata import DeciMamba2Backend
from vllm_longmamba.layers.decimated_mixer import DecimatedMixer
from vllm_longmamba.layers.decimation import StepDecimation
from vllm_longmamba.layers.mamba2 import LongMambaMixer2
from vllm_longmamba.layers.projections import project
from vllm_longmamba.layers.step_metadata import FilterRows


class DeciMambaMixer2(DecimatedMixer, LongMambaMixer2):
    """Mamba-2 mixer that can drop tokens for itself and the layers behind it."""

    def get_attn_backend(self) -> type[DeciMamba2Backend]:  # type: ignore[override]
        """See vLLM's `MambaBase`."""
        return DeciMamba2Backend

    def forward(self, hidden_states: torch.Tensor, mup_vector: torch.Tensor | None = None) -> torch.Tensor:
        """See vLLM's `MambaMixer2`. A layer that no token is dropped in or before stays as it is there.

        Args:
            hidden_states: (tokens, d_model).
            mup_vector: None; the models that have one are not decimated.
        """
        if not self.is_decimated:
            output: torch.Tensor = super().forward(hidden_states, mup_vector)
            return output
        return self._run_whole(hidden_states)

    def _project_out(self, scanned: torch.Tensor, projected: torch.Tensor, out: torch.Tensor) -> None:
        """See `LongMambaMixer2`; also where the norm has no kernel of this project."""
        if self._has_norm_kernel():
            super()._project_out(scanned, projected, out)
            return
        # Where vLLM compiles a model, it takes the norm's form for the compiler, which is slow outside.
        norm = self.norm.forward_cuda if scanned.is_cuda else self.norm.forward_native
        project(self.out_proj, norm(scanned, projected[..., : self.tped_intermediate_size]), out)

    def _decimate(self, hidden_states: torch.Tensor, step: StepDecimation) -> torch.Tensor:
        """See `DecimatedMixer`."""
        before, after = step.metadata[self.stage : self.stage + 2]
        decodes = before.num_decode_tokens
        sizes = [self.tped_intermediate_size, self.tped_conv_size, self.tped_dt_size]
        projected = self.in_proj(hidden_states)[0]
        _, x_B_C, dt = torch.split(projected[decodes:], sizes, dim=-1)
        convolved = self._convolve_prompts(x_B_C, before)
        rows = self._keep(step, dt, self.dt_bias)
        # Gathered whole, the parts keep the strides that the kernels were compiled for.
        projected = projected.index_select(0, rows)
        scanned = self._empty_scanned(projected)
        if decodes > 0:
            only_decodes = copy(before)
            only_decodes.num_prefills = only_decodes.num_prefill_tokens = 0
            with self._step(only_decodes):
                self.conv_ssm_forward(projected[:decodes], scanned[:decodes])
        convolved = convolved.index_select(0, rows[decodes:] - decodes)
        dt = torch.split(projected[decodes:], sizes, dim=-1)[2]
        if self.runs_own_kernels() and self._has_own_ssd:
            self._ssd(convolved, dt, after, FilterRows(), scanned[decodes:])
        else:
            states = self._ssd_by_vllm(convolved, dt, after, scanned[decodes:])
            self.kv_cache[1][after.state_indices_tensor_p] = states
        result = torch.empty((len(rows), hidden_states.shape[1]), dtype=projected.dtype, device=projected.device)
        self._project_out(scanned, projected, result)
        return result

    def _scratch_per_token(self, element_size: int) -> int:
        """See `DecimatedMixer`: convolution and output, dt in float32 three times, and a state for every 256 tokens."""
        state: int = self.head_dim * self.ssm_state_size * 4 // 256
        wide: int = element_size * (self.tped_conv_size + self.tped_intermediate_size)
        return wide + int(self.tped_dt_size) * (12 + state)
