"""What the mixers with the filter share: prompt tokens with a dt up to the threshold leave a global channel alone."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.config.mamba import MambaBackendEnum
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.mamba_utils import is_conv_state_dim_first
from vllm.model_executor.layers.mamba.ops.causal_conv1d import causal_conv1d_update as vllm_causal_conv1d_update

from vllm_longmamba.kernels import (
    PER_DECODE_TOKEN,
    causal_conv1d,
    causal_conv1d_update,
    compile_ahead,
    selective_state_update,
)
from vllm_longmamba.layers.prompt_filter import PromptFilter


class FilteredMixer:
    """What the LongMamba variants of both mixers share.

    Attributes:
        prompt_filter: the model's filter, None where the engine runs without it.
        dt_threshold: (rows, channels) float32 on the device, this rank's channels of this layer; set with the filter.
        dt_recorder: set while the model is calibrated: takes layer_index and dt (tokens, channels) float32 of one
            prompt, softplus(dt_raw + dt_bias).
        layer_index: number of the model's layer, by which the threshold table knows it.
    """

    prompt_filter: PromptFilter | None = None
    dt_threshold: torch.Tensor
    dt_recorder: Callable[[int, torch.Tensor], None] | None = None
    layer_index: int
    prefix: str
    A: torch.nn.Parameter
    D: torch.nn.Parameter
    conv1d: Any
    out_proj: Any
    activation: str
    kv_cache: tuple[torch.Tensor, ...]
    register_buffer: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """See vLLM's mixers."""
        super().__init__(*args, **kwargs)
        config = get_current_vllm_config()
        # Another backend of the state update, or its random rounding, is the user's choice: vLLM then runs it. So it
        # does where a request has more than one state, or a ring of tokens beside it.
        self._updates_state = (
            config.mamba_config.backend == MambaBackendEnum.TRITON
            and not config.mamba_config.enable_stochastic_rounding
            and config.num_speculative_tokens == 0
            and not config.cache_config.use_replayssm
        )
        # Of a step, until one has run.
        self._most_prompt_tokens: int | None = config.scheduler_config.max_num_batched_tokens
        self._most_decodes: int | None = config.scheduler_config.max_num_seqs

    def own_thresholds(self, prompt_filter: PromptFilter, tp_rank: int, tp_size: int) -> torch.Tensor:
        """This rank's thresholds of this layer.

        Args:
            prompt_filter: the model's filter.
            tp_rank: tensor-parallel rank; rank r holds the r-th of `tp_size` equal slices of the channels.
            tp_size: tensor-parallel degree.

        Returns:
            (rows, channels) float32 in host memory.

        Raises:
            ValueError: the table has not this layer, or another number of channels.
        """
        table = prompt_filter.table
        other_model = (
            f"it was made for another model ({table.metadata.model_id!r}), make one with `longmamba calibrate`"
        )
        if self.layer_index not in table.layers:
            raise ValueError(f"the threshold table has no layer {self.layer_index} ({self.prefix}); {other_model}")
        channels = self.A.shape[0]
        thresholds: torch.Tensor = table.thresholds(self.layer_index, prompt_filter.min_retention)
        if thresholds.shape[1] != channels * tp_size:
            raise ValueError(
                f"the threshold table has {thresholds.shape[1]} channels in layer {self.layer_index}, but the model "
                f"has {channels * tp_size}; {other_model}"
            )
        return thresholds[:, tp_rank * channels : (tp_rank + 1) * channels].float()

    def set_filter(self, prompt_filter: PromptFilter, thresholds: torch.Tensor) -> None:
        """Put `own_thresholds` on the device of the parameters; only `replace_table` may, for all layers at once."""
        if self.prompt_filter is None:
            # A buffer survives vLLM's sleep mode, and is no part of the checkpoint.
            on_device = thresholds.to(self.A.device).contiguous()
            self.register_buffer("dt_threshold", on_device, persistent=False)
        else:
            # In place: captured CUDA graphs read this tensor.
            self.dt_threshold.copy_(thresholds)
        self.prompt_filter = prompt_filter

    def runs_own_kernels(self) -> bool:
        """Whether this layer runs the kernels of this project on prompts; vLLM's elsewhere, as far as it has some."""
        return bool(self.A.is_cuda)

    @property
    def _runs_own_decodes(self) -> bool:
        """Whether it runs them on decode steps as well."""
        return self.runs_own_kernels() and self._updates_state

    @contextmanager
    def _step(self, metadata: Any) -> Iterator[None]:
        """While it lasts, this layer finds other metadata of the step."""
        of_layers: Any = get_forward_context().attn_metadata
        before = of_layers[self.prefix]
        of_layers[self.prefix] = metadata
        try:
            yield
        finally:
            of_layers[self.prefix] = before

    def _record_dt(self, dt: torch.Tensor, dt_bias: torch.Tensor) -> None:
        if self.dt_recorder is not None:
            after_softplus = torch.nn.functional.softplus(dt.float() + dt_bias.float())
            self.dt_recorder(self.layer_index, after_softplus)

    def _recurrence(self, x: torch.Tensor, dt: torch.Tensor, B: torch.Tensor, C: torch.Tensor) -> dict[str, Any]:
        """What every kernel of the recurrence takes, by its name there."""
        return {"x": x, "dt": dt, "A": self.A, "B": B, "C": C, "D": self.D}

    def _run_prefill(self, kernel: Callable[..., Any], **arguments: Any) -> None:
        """Call a kernel; the first time, which is vLLM's warm-up, also compile it for prompts of any length."""
        is_first = self._is_first_prefill
        if self._most_prompt_tokens is not None:
            compile_ahead(kernel, arguments, self._most_prompt_tokens)
            self._most_prompt_tokens = None
        kernel(**arguments, check=is_first)

    @property
    def _is_first_prefill(self) -> bool:
        """Whether none was run yet; arguments have the same layout in each, so that they are checked once."""
        return self._most_prompt_tokens is not None

    def _run_decode(self, token_rows: torch.Tensor | None, **arguments: Any) -> None:
        """Call `selective_state_update`; the first time, which is vLLM's warm-up, also compile it for any batch."""
        is_first = self._is_first_decode
        if self._most_decodes is not None:
            self._compile_decode(arguments, self._most_decodes)
            self._most_decodes = None
        threshold = self.dt_threshold if token_rows is not None else None
        selective_state_update(**arguments, dt_threshold=threshold, token_rows=token_rows, check=is_first)

    @property
    def _is_first_decode(self) -> bool:
        """Likewise."""
        return self._most_decodes is not None

    def _compile_decode(self, arguments: dict[str, Any], most_decodes: int) -> None:
        """With a filter and without: steps without a CUDA graph have one or the other."""
        compile_ahead(selective_state_update, arguments, most_decodes, PER_DECODE_TOKEN)
        if self.prompt_filter is not None:
            some_rows = torch.empty(len(arguments["x"]), dtype=torch.int32, device="meta")
            filters = {"dt_threshold": self.dt_threshold, "token_rows": some_rows}
            compile_ahead(selective_state_update, arguments | filters, most_decodes, PER_DECODE_TOKEN)
        self._compile_products(arguments["state_indices"])

    def _compile_products(self, slots: torch.Tensor) -> None:
        """Start to compile those of a decode step; slots: (batch,) of the states."""
        raise NotImplementedError

    def _convolve_prompts(self, x: torch.Tensor, metadata: Any, **filter_arguments: Any) -> torch.Tensor:
        weights = self._conv_weights()
        convolved: torch.Tensor = causal_conv1d(
            x,
            weights,
            self.conv1d.bias,
            # With speculative decoding a slot is longer; the inputs of draft tokens follow.
            self._conv_state()[..., : weights.shape[1] - 1],
            metadata.query_start_loc_p,
            metadata.state_indices_tensor_p,
            metadata.has_initial_states_p,
            silu=self._has_silu,
            check=self._is_first_prefill,
            **filter_arguments,
        )
        return convolved

    def _convolve_decodes(self, x: torch.Tensor, metadata: Any) -> torch.Tensor:
        weights, bias, state = self._conv_weights(), self.conv1d.bias, self._conv_state()
        slots = metadata.state_indices_tensor_d
        convolved: torch.Tensor
        if not self._runs_own_decodes:
            convolved = vllm_causal_conv1d_update(x, state, weights, bias, self.activation, conv_state_indices=slots)
            return convolved
        arguments = {"x": x, "weight": weights, "bias": bias, "conv_state": state, "state_indices": slots[:, 0]}
        if self._most_decodes is not None:
            compile_ahead(causal_conv1d_update, arguments, self._most_decodes, PER_DECODE_TOKEN)
        convolved = causal_conv1d_update(**arguments, silu=self._has_silu, check=self._is_first_decode)
        return convolved

    def _decode_convolution(self, slots: torch.Tensor) -> dict[str, Any]:
        """For a product whose launch also has the convolution; slots: (batch,) of the states."""
        return {
            "conv_weight": self._conv_weights(),
            "conv_bias": self.conv1d.bias,
            "conv_state": self._conv_state(),
            "state_indices": slots,
            "silu": self._has_silu,
        }

    @property
    def _has_silu(self) -> bool:
        return self.activation in ("silu", "swish")

    def _conv_weights(self) -> torch.Tensor:
        weight: torch.Tensor = self.conv1d.weight.data
        # On CPUs with bfloat16 instructions vLLM packs the weight for a kernel of its own, and keeps a copy.
        unpacked = None if weight.is_cuda else getattr(self.conv1d, "_cpu_unpacked_conv_weight", None)
        return weight.squeeze(1) if unpacked is None else unpacked

    def _conv_state(self) -> torch.Tensor:
        state = self.kv_cache[0]
        first: bool = is_conv_state_dim_first()
        return state if first else state.transpose(-1, -2)


def filtered_mixers(model: Any) -> list[FilteredMixer]:
    """The LongMamba mixers of a model, in the order of its layers."""
    return [module for module in model.modules() if isinstance(module, FilteredMixer)]
