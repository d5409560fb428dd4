"""What the DeciMamba variants of both mixers share: a layer runs on the tokens that the layers before it kept."""

from bisect import bisect_left
from typing import Any

import torch
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.forward_context import get_forward_context

from vllm_longmamba.decimamba_options import DeciMambaOptions
from vllm_longmamba.layers.decimation import StepDecimation, token_scores


class DecimatedMixer:
    """In front of a mixer whose `forward_impl` is the whole layer, from hidden states to hidden states.

    Where no prompt of a step loses tokens, in steps that only decode among others, the mixer runs as it is. Where some
    do, a layer gathers the tokens that are left (the first d_conv - 1 of a prompt's are then neighbours that were not
    neighbours in the prompt), runs on them, and adds nothing to the others, which the residual stream carries on.

    Attributes:
        options: of the engine.
        stage: how many decimating layers lie before this one.
        decimates: whether this layer is one.
        layer_index: number of the model's layer.
    """

    options: DeciMambaOptions
    stage = 0
    decimates = False
    layer_index: int
    prefix: str

    def set_decimation(self, options: DeciMambaOptions) -> None:
        """Tell the layer its part, once it knows its number."""
        assert options.layers is not None
        self.options = options
        self.stage = bisect_left(options.layers, self.layer_index)
        self.decimates = self.layer_index in options.layers

    @property
    def is_decimated(self) -> bool:
        """Whether the layer drops tokens, or one before it does."""
        return self.decimates or self.stage > 0

    def forward_impl(self, hidden_states: torch.Tensor, output: torch.Tensor) -> Any:
        """Run the layer on a batch of decode tokens followed by prefill tokens.

        Args:
            hidden_states: (tokens, d_model).
            output: (tokens, d_model), written in place; 0 for tokens that are dropped.
        """
        metadata = (get_forward_context().attn_metadata or {}).get(self.prefix)
        if metadata is None:
            held = self._scratch_of_a_prefill(hidden_states)
            super().forward_impl(hidden_states, output)  # type: ignore[misc]
            del held
            return None
        step: StepDecimation | None = metadata.decimation
        if step is None or not self.is_decimated:
            return super().forward_impl(hidden_states, output)  # type: ignore[misc]
        before = step.metadata[self.stage]
        rows = step.rows_of(self.stage)
        if rows is None:
            hidden_states = hidden_states[: before.num_decode_tokens + before.num_prefill_tokens]
        else:
            hidden_states = hidden_states.index_select(0, rows)
        if self.decimates:
            result = self._decimate(hidden_states, step)
        else:
            result = torch.empty_like(hidden_states)
            with self._step(before):  # type: ignore[attr-defined]
                super().forward_impl(hidden_states, result)  # type: ignore[misc]
        output.zero_()
        output.index_copy_(0, step.rows[self.stage + self.decimates - 1], result)
        return None

    def _decimate(self, hidden_states: torch.Tensor, step: StepDecimation) -> torch.Tensor:
        """Run a decimating layer: its projections and convolution on all tokens, the rest on those that it keeps.

        Args:
            hidden_states: (tokens, d_model) of this layer's stage.
            step: the choice is added to it.

        Returns:
            (decode tokens + kept, d_model)
        """
        raise NotImplementedError

    def _keep(self, step: StepDecimation, dt: torch.Tensor, dt_bias: torch.Tensor) -> torch.Tensor:
        """The rows that stay, (decode tokens + kept,) int64, by the raw dt (tokens, channels) of the prompts."""
        scores = token_scores(dt, dt_bias, self.options.score)
        # Each rank has its own channels, and all must choose the same tokens.
        return step.keep(self.stage, tensor_model_parallel_all_reduce(scores))

    def _scratch_of_a_prefill(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Memory as much as a prefill of these tokens takes beyond what vLLM's profile run sees, on a GPU.

        A whole prompt is one step here, so that this is much more than in other models.
        """
        if not hidden_states.is_cuda:
            return None
        size = len(hidden_states) * self._scratch_per_token(hidden_states.element_size())
        return torch.empty(size, dtype=torch.uint8, device=hidden_states.device)

    def _scratch_per_token(self, element_size: int) -> int:
        """Bytes."""
        raise NotImplementedError
