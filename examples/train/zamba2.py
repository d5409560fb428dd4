"""A Zamba2 language model; parameters are named as in Hugging Face checkpoints of Zamba2ForCausalLM.

One shared block of attention and MLP (`num_mem_blocks` 1, no adapters on the attention) is called before some of the
Mamba-2 layers. Its rotary base is small: every frequency turns many times within the training length, so that a product
of query and key cannot look for content at any distance. In training it can see keys of other sequences as well, so
that its softmax learns to leave out the thousands of keys of a long text. See README.md.
"""

import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from .mixers import Mamba2Mixer, RMSNorm
from .settings import VOCABULARY, Settings


class Attention(nn.Module):
    """Causal attention over the concatenation of hidden states and embeddings (twice d_model wide)."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        width = 2 * settings.d_model
        self.headdim, self.rope_theta = width // settings.attention_heads, settings.rope_theta
        self.far_sequences, self.far_length = settings.far_sequences, settings.far_length
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, settings.d_model, bias=False)

    def forward(self, hidden: torch.Tensor, window: int | None) -> torch.Tensor:
        """hidden (batch, tokens, 2 * d_model); window: how many tokens one may see, itself included; None: all."""
        tokens = hidden.shape[1]
        q, k, v = (
            proj(hidden).unflatten(-1, (-1, self.headdim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        position = torch.arange(tokens, device=hidden.device)
        q, mask = self._rotate(q, position), None
        if self.training and self.far_sequences:
            k, v, mask = self._with_far_keys(k, v, position)
        else:
            k = self._rotate(k, position)
            if window is not None:
                distance = position[:, None] - position
                mask = (distance >= 0) & (distance < window)
        scale = (self.headdim / 2) ** -0.5  # Zamba2's
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def _with_far_keys(
        self, k: torch.Tensor, v: torch.Tensor, position: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A sequence's keys, rotated, and values, then those of other sequences of the batch as if they stood before,
        and what to add to the products of queries and keys.

        The text's length is drawn, uniform in the logarithm, up to `far_length`. The few sequences that stand for all
        that comes before are put at random places of it, and each of their keys counts as many times as makes up for
        the others.
        """
        tokens = k.shape[2]
        before = (torch.rand((), device=k.device) * math.log(self.far_length / tokens)).exp() * tokens
        keys, values = [self._rotate(k, position)], [v]
        for shift in range(1, self.far_sequences + 1):
            distance = (tokens + torch.rand((), device=k.device) * before).round()
            keys.append(self._rotate(k.roll(shift, 0), position - distance))
            values.append(v.roll(shift, 0))
        future = torch.full((tokens, tokens), -torch.inf, device=k.device, dtype=k.dtype).triu(1)
        times = (before / (self.far_sequences * tokens)).log().to(k.dtype)
        mask = torch.cat([future, times.expand(tokens, self.far_sequences * tokens)], dim=1)
        return torch.cat(keys, dim=2), torch.cat(values, dim=2), mask

    def _rotate(self, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Rotary position embedding of positions (tokens,), halves rotated against each other.

        x (batch, heads, tokens, headdim).
        """
        half = torch.arange(0, self.headdim, 2, device=x.device) / self.headdim
        angle = position[:, None] * self.rope_theta**-half
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class FeedForward(nn.Module):
    """A gated MLP with a low-rank adapter for each layer that calls it."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        d_model, width, rank = settings.d_model, settings.mlp_width, settings.adapter_rank
        self.gate_up_proj = nn.Linear(d_model, 2 * width, bias=False)
        self.down_proj = nn.Linear(width, d_model, bias=False)
        self.gate_up_proj_adapter_list = nn.ModuleList(
            nn.Sequential(nn.Linear(d_model, rank, bias=False), nn.Linear(rank, 2 * width, bias=False))
            for _ in settings.hybrid_layers
        )

    def forward(self, hidden: torch.Tensor, call: int) -> torch.Tensor:
        """hidden (batch, tokens, d_model); call: which of the hybrid layers calls."""
        gate, up = (self.gate_up_proj(hidden) + self.gate_up_proj_adapter_list[call](hidden)).chunk(2, dim=-1)
        return self.down_proj(F.gelu(gate) * up)


class SharedTransformer(nn.Module):
    """Attention and MLP without residuals of their own: what they return goes to a Mamba layer's input."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.self_attn = Attention(settings)
        self.feed_forward = FeedForward(settings)
        self.input_layernorm = RMSNorm(2 * settings.d_model)
        self.pre_ff_layernorm = RMSNorm(settings.d_model)

    def forward(self, hidden: torch.Tensor, embedded: torch.Tensor, call: int, window: int | None) -> torch.Tensor:
        """hidden, embedded (batch, tokens, d_model)."""
        attended = self.self_attn(self.input_layernorm(torch.cat([hidden, embedded], dim=-1)), window)
        return self.feed_forward(self.pre_ff_layernorm(attended), call)


class MambaDecoder(nn.Module):
    """Norm and Mamba-2 mixer on a float32 residual stream."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.mamba = Mamba2Mixer(settings)
        self.input_layernorm = RMSNorm(settings.d_model)

    def forward(self, hidden: torch.Tensor, attended: torch.Tensor | None = None) -> torch.Tensor:
        """hidden (batch, tokens, d_model) float32; attended: of the same shape, added to the mixer's input only."""
        return hidden + self.mamba(self.input_layernorm(hidden if attended is None else hidden + attended))


class HybridLayer(nn.Module):
    """A Mamba layer whose input the shared transformer adds to."""

    def __init__(self, settings: Settings, shared_transformer: SharedTransformer | None) -> None:
        super().__init__()
        self.linear = nn.Linear(settings.d_model, settings.d_model, bias=False)
        self.mamba_decoder = MambaDecoder(settings)
        if shared_transformer is not None:
            # The first hybrid layer holds the block, as in a checkpoint; the others only call it.
            self.shared_transformer = shared_transformer

    def forward(self, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """hidden (batch, tokens, d_model) float32; attended: what the shared transformer returned."""
        return self.mamba_decoder(hidden, self.linear(attended))


class Zamba2Model(nn.Module):
    """Everything but the head."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, settings.d_model)
        nn.init.normal_(self.embed_tokens.weight, std=0.02)
        shared, first = SharedTransformer(settings), min(settings.hybrid_layers)
        self.layers = nn.ModuleList(
            HybridLayer(settings, shared if layer == first else None)
            if layer in settings.hybrid_layers
            else MambaDecoder(settings)
            for layer in range(settings.n_layer)
        )
        self.final_layernorm = RMSNorm(settings.d_model)
        with torch.no_grad():
            for decoder in self.modules():
                if isinstance(decoder, MambaDecoder):
                    decoder.mamba.out_proj.weight /= settings.n_layer**0.5


class Zamba2LM(nn.Module):
    """A Zamba2 language model whose head is its embedding.

    Attributes:
        window: how many tokens attention may see in evaluation; None, as in training and in the checkpoint: all.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.model = Zamba2Model(settings)
        self.hybrid_layers = sorted(settings.hybrid_layers)
        self.window: int | None = None

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits (batch, tokens, vocabulary) after each of tokens (batch, tokens)."""
        embedded = self.model.embed_tokens(tokens)
        shared = self.model.layers[self.hybrid_layers[0]].shared_transformer
        hidden = embedded
        for index, layer in enumerate(self.model.layers):
            if index in self.hybrid_layers:
                call = self.hybrid_layers.index(index)
                hidden = layer(hidden, shared(hidden, embedded, call, self.window))
            else:
                hidden = layer(hidden)
        return F.linear(self.model.final_layernorm(hidden), self.model.embed_tokens.weight)

    def blocks(self) -> list[nn.Module]:
        """The repeated parts, which are compiled one by one: equal ones share their code."""
        return [*self.model.layers, self.model.layers[self.hybrid_layers[0]].shared_transformer]
