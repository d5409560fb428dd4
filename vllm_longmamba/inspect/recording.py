"""The worker's part of `longmamba inspect`: reads what the SSM of every layer reads, while the real model runs."""

from typing import Any

import torch
from torch.nn import functional

from vllm_longmamba.inspect.hidden_attention import LayerInputs, mean_distance, receptive_field
from vllm_longmamba.layers.filtered_mixer import filtered_mixers
from vllm_longmamba.layers.prompt_filter import PromptFilter
from vllm_longmamba.layers.replace_table import replace_table

# Pixels of a side of a receptive field, and channels of a layer whose mean distance is taken.
MAP_BINS = 256
DISTANCE_CHANNELS = 64


class InspectWorkerExtension:
    """Methods that `longmamba inspect` calls in the worker (vLLM's `worker_extension_cls`)."""

    get_model: Any
    _longmamba_filter: PromptFilter
    _longmamba_hooks: list[Any]
    # Layer index -> what `_measure` returns.
    _longmamba_results: dict[int, dict[str, Any]]

    def longmamba_inspect_begin(self, row: int, is_filtered: bool, chosen: list[tuple[int, int]]) -> None:
        """Measure the prompt that comes next, of this row, with the filter or without it.

        `chosen` are pairs of layer and channel whose receptive field is drawn.
        """
        mixers: list[Any] = filtered_mixers(self.get_model())
        own = mixers[0].prompt_filter
        assert own is not None, "longmamba inspect starts the engine with the filter"
        self._longmamba_filter, self._longmamba_results = own, {}
        if not is_filtered:
            # No channel has a retention above 1, so that all are local.
            replace_table(self.get_model(), PromptFilter(own.table, min_retention=1.0))

        def before(mixer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, mup_vector = _prompt(mixer, args, kwargs)
            if hidden is None:
                return
            layer = mixer.layer_index
            if layer in self._longmamba_results:
                raise ValueError(
                    f"inspection expects whole prompts, but layer {layer} got one in parts; max_num_batched_tokens "
                    "must be at least the longest prompt"
                )
            channels = [channel for of_layer, channel in chosen if of_layer == layer]
            inputs = layer_inputs(mixer, hidden, mup_vector)
            thresholds = mixer.dt_threshold[row].to(inputs.dt.device)
            self._longmamba_results[layer] = _measure(inputs, thresholds, own.unfiltered_end, channels)

        self._longmamba_hooks = [mixer.register_forward_pre_hook(before, with_kwargs=True) for mixer in mixers]

    def longmamba_inspect_end(self) -> dict[int, dict[str, Any]]:
        """What was measured: layer index -> the fields of a `LayerMeasurement`, as plain lists that vLLM hands on."""
        for hook in self._longmamba_hooks:
            hook.remove()
        replace_table(self.get_model(), self._longmamba_filter)
        return self._longmamba_results


def _prompt(
    mixer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """A prompt's part (tokens, d_model) of a mixer's arguments, None where there is none, and Falcon-H1's factors."""
    from vllm.forward_context import get_forward_context

    metadata = (get_forward_context().attn_metadata or {}).get(mixer.prefix)
    if metadata is None or metadata.num_prefill_tokens == 0:
        return None, None
    # Mamba-1's second argument is the output; layer_inputs reads mup_vector for Mamba-2 only.
    given = dict(zip(("hidden_states", "mup_vector"), args, strict=False)) | kwargs
    start = metadata.num_decode_tokens
    return given["hidden_states"][start : start + metadata.num_prefill_tokens], given.get("mup_vector")


def _measure(inputs: LayerInputs, thresholds: torch.Tensor, unfiltered_end: int, channels: list[int]) -> dict[str, Any]:
    """Take what the SSM of one layer would read without the filter; thresholds are (channels,), -1.0 for no filter."""
    kept = inputs.dt > thresholds
    kept[max(0, len(kept) - unfiltered_end) :] = True
    filtered = LayerInputs(inputs.dt * kept, inputs.A, inputs.B, inputs.C)
    sampled = torch.linspace(0, inputs.channels - 1, min(DISTANCE_CHANNELS, inputs.channels)).round().long()
    return {
        "kept": kept.double().mean(0).tolist(),
        "distance": float(mean_distance(filtered, sampled.tolist()).mean()),
        "maps": {channel: receptive_field(filtered, channel, MAP_BINS).tolist() for channel in channels},
    }


def layer_inputs(mixer: Any, hidden: torch.Tensor, mup_vector: torch.Tensor | None) -> LayerInputs:
    """What a mixer's SSM reads for a prompt that begins with an empty state; the convolution is repeated in torch.

    Args:
        mixer: a LongMamba mixer of a model that is not tensor-parallel.
        hidden: (tokens, d_model), the mixer's input.
        mup_vector: Falcon-H1's factors of the input projection, None elsewhere.
    """
    from vllm.model_executor.layers.mamba.mamba_mixer import MambaMixer

    if isinstance(mixer, MambaMixer):
        x, _ = mixer.in_proj(hidden)[0].chunk(2, dim=-1)
        x = _convolve(x, mixer)
        dt, B, C = MambaMixer._ssm_transform(mixer, x)
        dt = functional.softplus(dt.transpose(-2, -1).float() + mixer.dt_proj.bias.float())
        return LayerInputs(dt, mixer.A.data, B.unsqueeze(1), C.unsqueeze(1))
    projected = mixer.in_proj(hidden)[0]
    if mup_vector is not None:
        projected = projected * mup_vector
    tokens, heads = len(hidden), mixer.A.shape[0]
    _, x_B_C, raw_dt = projected.split([mixer.intermediate_size, mixer.conv_dim, heads], dim=-1)
    _, B, C = mixer.split_hidden_states_B_C_fn(_convolve(x_B_C, mixer))
    dt = functional.softplus(raw_dt.float() + mixer.dt_bias.float())
    B, C = (tensor.reshape(tokens, mixer.n_groups, mixer.ssm_state_size) for tensor in (B, C))
    return LayerInputs(dt, mixer.A.data.unsqueeze(-1), B, C)


def _convolve(x: torch.Tensor, mixer: Any) -> torch.Tensor:
    """The causal depthwise convolution and its silu: (tokens, channels) to the same."""
    weight = mixer.conv1d.weight
    weight = weight.view(weight.shape[0], 1, weight.shape[-1])
    padded = functional.pad(x.transpose(0, 1), (weight.shape[-1] - 1, 0))
    # cuDNN's default for float32 is TF32, which has ten bits of precision
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        convolved = functional.conv1d(padded[None], weight, mixer.conv1d.bias, groups=len(weight))[0]
    return functional.silu(convolved).transpose(0, 1).contiguous()
