"""A whole language model: reads prompts under a method, then goes on token by token from its states."""

import copy
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from .checkpoint import read_checkpoint
from .layers import rms_norm
from .methods import LayerPlan, LayerView, LongMamba, Plain, Prompt, ReadingMethod
from .mixers import Mixer, MixerState, Projection, make_mixer

# Tokens that a layer works on at a time, all prompts of a batch together: bounds the memory.
SEGMENT_TOKENS = {"cpu": 1024, "cuda": 8192}


@dataclass(frozen=True)
class Layer:
    """One residual block: hidden + mixer(norm(hidden)).

    Attributes:
        index: which layer.
        norm: (d_model,) weight of its RMS norm.
        mixer: Mamba-1 or Mamba-2.
    """

    index: int
    norm: torch.Tensor
    mixer: Mixer


class TorchModel:
    """A Mamba language model in float32 (so a residual stream in float32 too, whatever the checkpoint asks for).

    Attributes:
        layers: its layers.
        embedding: (vocabulary, d_model).
        head: (vocabulary, d_model); the embedding itself where tied.
        method: what acts on the prompts.
    """

    def __init__(
        self,
        folder: str | Path,
        method: str | ReadingMethod = "plain",
        device: str | None = None,
        segment_tokens: int | None = None,
    ) -> None:
        """Load a checkpoint.

        Args:
            folder: original state-spaces or Hugging Face format; Mamba-1, Mamba-2 or FalconMamba.
            method: "plain", "longmamba" (with the table that the engine would find), or a method.
            device: "cpu" or "cuda"; None takes the GPU where there is one.
            segment_tokens: tokens that a layer works on at a time; changes rounding, speed and memory only.

        Raises:
            ValueError: a folder that holds no such checkpoint, another device, an unknown method, or one that does not
                fit.
        """
        folder = Path(folder)
        checkpoint = read_checkpoint(folder)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if self.device.type not in SEGMENT_TOKENS:
            raise ValueError(f"TorchModel: device must be 'cpu' or 'cuda', got {device!r}")
        self.segment_tokens = segment_tokens or SEGMENT_TOKENS[self.device.type]
        weights = {name: weight.to(self.device, torch.float32) for name, weight in checkpoint.weights.items()}
        self.eps: float = checkpoint.config["layer_norm_epsilon"]
        self.layers: list[Layer] = []
        for index in range(checkpoint.config["num_hidden_layers"]):
            prefix = f"backbone.layers.{index}."
            mixer = {name.removeprefix(prefix + "mixer."): w for name, w in weights.items() if name.startswith(prefix)}
            self.layers.append(Layer(index, weights[prefix + "norm.weight"], make_mixer(mixer, checkpoint.config)))
        self.embedding = weights["backbone.embedding.weight"]
        self.head = weights.get("lm_head.weight", self.embedding)
        self.final_norm = weights["backbone.norm_f.weight"]
        self.method = self._fitting(_named_method(method, folder))

    @property
    def channels(self) -> dict[int, int]:
        """Layer index -> channels: d_inner in Mamba-1, nheads in Mamba-2."""
        return {layer.index: layer.mixer.A.shape[0] for layer in self.layers}

    def with_method(self, method: ReadingMethod) -> "TorchModel":
        """The same model, weights shared, under another method.

        Raises:
            ValueError: the method does not fit.
        """
        other = copy.copy(self)
        other.method = self._fitting(method)
        return other

    def generate(
        self, prompts: Sequence[Sequence[int]], max_tokens: int, stop: Collection[int] = ()
    ) -> list[list[int]]:
        """Continue prompts greedily.

        Args:
            prompts: token ids of each.
            max_tokens: tokens to generate for each.
            stop: a continuation ends before one of these tokens.

        Returns:
            Token ids of the continuations, in the order of the prompts.

        Raises:
            ValueError: an empty prompt.
        """
        continuations: list[list[int]] = [[] for _ in prompts]
        for places in self._batches([len(prompt) for prompt in prompts]):
            generated = self.read([prompts[place] for place in places]).generate(max_tokens)
            for place, tokens in zip(places, generated.tolist(), strict=True):
                end = next((number for number, token in enumerate(tokens) if token in stop), len(tokens))
                continuations[place] = tokens[:end]
        return continuations

    def last_logprobs(self, tokens: Sequence[int], n: int) -> torch.Tensor:
        """Score the last tokens of a text, all of which counts as prompt.

        Args:
            tokens: token ids, more than `n`.
            n: tokens to score, at least 1.

        Returns:
            (n,) float32 on the CPU: log-probability of each of the last n tokens, given all before it.

        Raises:
            ValueError: too few tokens.
        """
        if not 1 <= n < len(tokens):
            raise ValueError(f"last_logprobs: n must lie between 1 and the text's {len(tokens)} tokens - 1, got {n}")
        logits = self.read([tokens], outputs=n + 1).logits[0, :-1]
        scored = torch.tensor(list(tokens[-n:]), device=self.device)
        return logits.log_softmax(-1).gather(1, scored[:, None])[:, 0].cpu()

    @torch.inference_mode()
    def read(self, prompts: Sequence[Sequence[int]], outputs: int = 1) -> "Reading":
        """Read prompts under the method.

        Args:
            prompts: token ids; all of one length, at least 1.
            outputs: how many of the last tokens' outputs are wanted, at least 1.

        Raises:
            ValueError: no tokens, different lengths, no outputs, or several prompts where the method takes one.
        """
        lengths = {len(prompt) for prompt in prompts}
        if len(lengths) != 1 or 0 in lengths:
            raise ValueError(f"read: prompts must have one length of at least 1 token, got {sorted(lengths)}")
        if outputs < 1:
            raise ValueError(f"read: outputs must be at least 1, got {outputs}")
        if self.method.needs_whole_prompt and len(prompts) > 1:
            raise ValueError(f"read: {self.method.name} takes one prompt at a time, got {len(prompts)}")
        ids = torch.tensor([list(prompt) for prompt in prompts], device=self.device)  # (batch, tokens)
        prompt = Prompt(ids.shape[1], outputs)
        states = [layer.mixer.empty_state(len(prompts)) for layer in self.layers]
        window = prompt.length if self.method.needs_whole_prompt else self._segment(len(prompts))
        tail = self.embedding.new_empty(len(prompts), 0, self.embedding.shape[1])
        start = 0
        for part in torch.split(ids, window, dim=1):
            tail = torch.cat([tail, self._run(part, states, prompt, start)], dim=1)[:, -outputs:]
            start += part.shape[1]
        return Reading(self, states, self.logits(tail), prompt)

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Places of prompts that are read together: of one length, and as many as fill a segment."""
        by_length: dict[int, list[int]] = {}
        for place, length in enumerate(lengths):
            by_length.setdefault(length, []).append(place)
        for length, places in by_length.items():
            size = 1 if self.method.needs_whole_prompt else max(1, self.segment_tokens // max(length, 1))
            yield from (places[first : first + size] for first in range(0, len(places), size))

    def _segment(self, batch: int) -> int:
        return max(1, self.segment_tokens // batch)

    def _fitting(self, method: ReadingMethod) -> ReadingMethod:
        method.check(self.channels)
        return method

    def _run(self, ids: torch.Tensor, states: list[MixerState], prompt: Prompt | None, start: int = 0) -> torch.Tensor:
        """Run tokens (batch, tokens) through all layers; the states move on.

        Args:
            prompt: the prompt that they belong to; None for generated tokens.
            start: tokens of the prompt before them.

        Returns:
            (batch, tokens that were kept, d_model)
        """
        hidden = self.embedding[ids]
        left = 0 if prompt is None else prompt.length - start
        for layer, state in zip(self.layers, states, strict=True):
            plan = LayerPlan()
            if prompt is not None:
                view = LayerView(layer.index, layer.mixer.A, partial(self._projections, layer, hidden, state))
                plan = self.method.plan(view, prompt)
            hidden = self._run_layer(layer, hidden, state, plan, left - plan.unfiltered_end)
        return hidden

    def _run_layer(
        self, layer: Layer, hidden: torch.Tensor, state: MixerState, plan: LayerPlan, change_first: int
    ) -> torch.Tensor:
        """The plan's change of dt is for the first `change_first` tokens."""
        outputs, start = [], 0
        segments = torch.split(hidden, self._segment(hidden.shape[0]), dim=1)
        for segment in segments:
            end = start + segment.shape[1]
            projection, state.history = layer.mixer.project(self._normed(layer, segment), state.history)
            if plan.kept_tokens is not None:
                kept = plan.kept_tokens[(plan.kept_tokens >= start) & (plan.kept_tokens < end)] - start
                projection, segment = projection.take(kept), segment[:, kept]
            if plan.change_dt is not None:
                first = max(0, change_first - start)
                changed = plan.change_dt(projection.dt[:, :first])
                projection = projection.with_dt(torch.cat([changed, projection.dt[:, first:]], dim=1))
            if segment.shape[1]:
                outputs.append(segment + layer.mixer.scan(projection, state))
            start = end
        return torch.cat(outputs, dim=1)

    def _projections(self, layer: Layer, hidden: torch.Tensor, state: MixerState) -> Iterator[Projection]:
        history = state.history
        for segment in torch.split(hidden, self._segment(hidden.shape[0]), dim=1):
            projection, history = layer.mixer.project(self._normed(layer, segment), history)
            yield projection

    def _normed(self, layer: Layer, hidden: torch.Tensor) -> torch.Tensor:
        return rms_norm(hidden, layer.norm, self.eps)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., vocabulary) from (..., d_model) behind the last layer."""
        return rms_norm(hidden, self.final_norm, self.eps) @ self.head.T


@dataclass(frozen=True)
class Reading:
    """Prompts that were read, and the states to go on from.

    Attributes:
        model: what read them.
        states: of each layer; `append` moves them on.
        logits: (batch, outputs, vocabulary) after the last tokens of the prompts.
        prompt: the prompts.
    """

    model: TorchModel
    states: list[MixerState]
    logits: torch.Tensor
    prompt: Prompt

    @torch.inference_mode()
    def append(self, ids: torch.Tensor, method_acts: bool = False) -> torch.Tensor:
        """Run generated tokens.

        Args:
            ids: (batch, tokens) int64 on the model's device.
            method_acts: whether the method acts on them as on the prompt, whose length it goes by. No method is meant
                to; this is for measuring what it would do. Not for one that needs the whole prompt.

        Returns:
            (batch, tokens, vocabulary) logits after each.
        """
        return self.model.logits(self.model._run(ids, self.states, self.prompt if method_acts else None))

    def generate(self, max_tokens: int) -> torch.Tensor:
        """Go on greedily.

        Returns:
            (batch, max_tokens) int64.
        """
        logits = self.logits[:, -1:]
        generated = [torch.empty(len(logits), 0, dtype=torch.int64, device=logits.device)]
        for number in range(max_tokens):
            generated.append(logits.argmax(-1))
            if number + 1 < max_tokens:
                logits = self.append(generated[-1])
        return torch.cat(generated, dim=1)


def _named_method(method: str | ReadingMethod, folder: Path) -> ReadingMethod:
    if not isinstance(method, str):
        return method
    if method == "plain":
        return Plain()
    if method == "longmamba":
        return LongMamba.for_folder(folder)
    raise ValueError(
        f"TorchModel: method must be 'plain', 'longmamba' or a method object, got {method!r}; for DeciMamba, whose "
        "settings have no defaults, pass DeciMamba(layers=..., L_base=...)"
    )
