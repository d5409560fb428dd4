"""The Mamba-1 mixer of DeciMamba."""

import torch

from vllm_longmamba.layers.decimated_metadata import DeciMamba1Backend
from vllm_longmamba.layers.decimated_mixer import DecimatedMixer
from vllm_longmamba.layers.decimation import StepDecimation
from vllm_longmamba.layers.mamba1 import LongMambaMixer
from vllm_longmamba.layers.projections import project
from vllm_longmamba.layers.step_metadata import FilterRows


class DeciMambaMixer(DecimatedMixer, LongMambaMixer):
    """Mamba-1 mixer, and FalconMamba's, that can drop tokens for itself and the layers behind it."""

    def get_attn_backend(self) -> type[DeciMamba1Backend]:  # type: ignore[override]
        """See vLLM's `MambaBase`."""
        return DeciMamba1Backend

    def _decimate(self, hidden_states: torch.Tensor, step: StepDecimation) -> torch.Tensor:
        """See `DecimatedMixer`."""
        before, after = step.metadata[self.stage : self.stage + 2]
        decodes = before.num_decode_tokens
        projected = self.in_proj(hidden_states)[0]
        x = self._convolve_prompts(projected[decodes:].chunk(2, dim=-1)[0], before)
        dt, B, C = self._dt_B_C(x)
        rows = self._keep(step, dt, self.dt_proj.bias)
        # Gathered with x, the gate keeps the strides that the kernels were compiled for.
        x_of_decodes, z = projected.index_select(0, rows).chunk(2, dim=-1)
        scanned = torch.empty(z.shape, dtype=z.dtype, device=z.device)
        if decodes > 0:
            convolved = self._convolve_decodes(x_of_decodes[:decodes], after)
            self._decode(convolved, z[:decodes], after, FilterRows(), scanned[:decodes])
        kept = rows[decodes:] - decodes
        where = (after.query_start_loc_p, after.state_indices_tensor_p, after.has_initial_states_p)
        x, dt, B, C = (tensor.index_select(0, kept) for tensor in (x, dt, B, C))
        self._scan(x, dt, B, C, z[decodes:], where, None, None, scanned[decodes:])
        result = torch.empty((len(rows), hidden_states.shape[1]), dtype=z.dtype, device=z.device)
        return project(self.out_proj, scanned, result)

    def _scratch_per_token(self, element_size: int) -> int:
        """See `DecimatedMixer`: convolution, dt and output, and a state for every 64 tokens."""
        d_inner, d_state = self.A.shape
        return d_inner * (3 * element_size + d_state // 16)
