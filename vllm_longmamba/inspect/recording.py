"""The worker's part of `longmamba inspect`: reads what the SSM of every layer reads, while the real model runs."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.nn import functional

from vllm_longmamba.inspect.hidden_attention import LayerInputs, decay, mean_distance, receptive_field
from vllm_longmamba.layers.filtered_mixer import filtered_mixers
from vllm_longmamba.layers.prompt_filter import PromptFilter
from vllm_longmamba.layers.replace_table import replace_table

# Points of a decay curve, pixels of a side of a receptive field, and channels of a layer whose mean distance is taken.
CURVE_POINTS = 256
MAP_BINS = 256
DISTANCE_CHANNELS = 64


class PromptRecorder:
    """Measures one prompt in every layer, as it passes.

    Args:
        thresholds: layer index -> (channels,) threshold of dt for this prompt; -1.0 filters nothing.
        chosen: pairs of layer and channel whose receptive field is drawn.
        unfiltered_end: as many of the prompt's last tokens are not filtered.
    """

    def __init__(self, thresholds: dict[int, torch.Tensor], chosen: list[list[int]], unfiltered_end: int) -> None:
        self.thresholds = thresholds
        self.chosen = chosen
        self.unfiltered_end = unfiltered_end
        self.results: dict[str, torch.Tensor] = {}

    def record(self, layer: int, inputs: LayerInputs) -> None:
        """Take what the SSM of one layer would read without the filter.

        Raises:
            ValueError: the layer was seen before, so that the prompt came in parts.
        """
        if f"{layer}.decay" in self.results:
            raise ValueError(
                f"inspection expects whole prompts, but layer {layer} got one in parts; max_num_batched_tokens must be "
                "at least the longest prompt"
            )
        kept = inputs.dt > self.thresholds[layer].to(inputs.dt.device)
        kept[max(0, len(kept) - self.unfiltered_end) :] = True
        self._measure(layer, LayerInputs(inputs.dt * kept, inputs.A, inputs.B, inputs.C), kept)

    def _measure(self, layer: int, inputs: LayerInputs, kept: torch.Tensor) -> None:
        points = min(CURVE_POINTS, inputs.tokens)
        positions = torch.arange(1, points + 1, device=kept.device) * inputs.tokens // points
        sampled = torch.linspace(0, inputs.channels - 1, min(DISTANCE_CHANNELS, inputs.channels)).round().long()
        results = {
            "kept": kept.double().mean(0),
            "positions": positions,
            "decay": decay(inputs, positions),
            "distance_channels": sampled,
            "distance": mean_distance(inputs, sampled.tolist()),
        }
        for channel in (channel for of_layer, channel in self.chosen if of_layer == layer):
            results[f"map.{channel}"] = receptive_field(inputs, channel, MAP_BINS)
        for name, tensor in results.items():
            self.results[f"{layer}.{name}"] = tensor.cpu().contiguous()


class InspectWorkerExtension:
    """Methods that `longmamba inspect` calls in the worker (vLLM's `worker_extension_cls`)."""

    get_model: Any
    _longmamba_filter: PromptFilter
    _longmamba_recorder: PromptRecorder | None

    def longmamba_inspect_start(self) -> None:
        """Attach to all mixers of this worker."""
        self._longmamba_recorder = None
        for mixer in filtered_mixers(self.get_model()):
            assert mixer.prompt_filter is not None, "longmamba inspect starts the engine with the filter"
            self._longmamba_filter = mixer.prompt_filter
            mixer.register_forward_pre_hook(self._longmamba_hook, with_kwargs=True)  # type: ignore[attr-defined]

    def longmamba_inspect_begin(self, row: int, is_filtered: bool, chosen: list[list[int]]) -> None:
        """Measure the next prompt.

        Args:
            row: the prompt's row of the table.
            is_filtered: whether the model runs with the filter.
            chosen: pairs of layer and channel whose receptive field is drawn.
        """
        own = self._longmamba_filter
        # No channel has a retention above 1, so that all are local.
        replace_table(self.get_model(), own if is_filtered else PromptFilter(own.table, min_retention=1.0))
        thresholds = {mixer.layer_index: mixer.dt_threshold[row] for mixer in filtered_mixers(self.get_model())}
        self._longmamba_recorder = PromptRecorder(thresholds, chosen, own.unfiltered_end)

    def longmamba_inspect_end(self, path: str) -> None:
        """Write what was measured to a safetensors file."""
        assert self._longmamba_recorder is not None
        save_file(self._longmamba_recorder.results, Path(path))
        self._longmamba_recorder = None

    def _longmamba_hook(self, mixer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        from vllm.forward_context import get_forward_context

        metadata = (get_forward_context().attn_metadata or {}).get(mixer.prefix)
        if self._longmamba_recorder is None or metadata is None or metadata.num_prefill_tokens == 0:
            return
        # Mamba-1's second argument is the output; layer_inputs reads mup_vector for Mamba-2 only.
        given = dict(zip(("hidden_states", "mup_vector"), args, strict=False)) | kwargs
        start = metadata.num_decode_tokens
        hidden = given["hidden_states"][start : start + metadata.num_prefill_tokens]
        self._longmamba_recorder.record(mixer.layer_index, layer_inputs(mixer, hidden, given.get("mup_vector")))


def layer_inputs(mixer: Any, hidden: torch.Tensor, mup_vector: torch.Tensor | None) -> LayerInputs:
    """What a mixer's SSM reads for a prompt that begins with an empty state.

    The projections are the mixer's own modules; the convolution is repeated in plain torch.

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
