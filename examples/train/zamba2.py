"""A Zamba2 language model; parameters are named as in Hugging Face checkpoints of Zamba2ForCausalLM.

One shared block of attention and MLP (`num_mem_blocks` 1, no adapters on the attention) is called before some of the
Mamba-2 layers. Its rotary base is small: every frequency turns many times within the training length, so that a product
of query and key cannot look for content at any distance. It runs over `attention_length` tokens of a step, across
sequences, so that its softmax learns to leave out the thousands of keys of a long text. See README.md.
"""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from .mixers import Mamba2Mixer, RMSNorm
from .settings import Settings


class Attention(nn.Module):
    """Causal attention over the concatenation of hidden states and embeddings (twice d_model wide)."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        width = 2 * settings.d_model
        self.headdim, self.rope_theta = width // settings.attention_heads, settings.rope_theta
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, settings.d_model, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden (batch, tokens, 2 * d_model)."""
        q, k, v = (
            proj(hidden).unflatten(-1, (-1, self.headdim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        scale = (self.headdim / 2) ** -0.5  # Zamba2's
        y = F.scaled_dot_product_attention(self._rotate(q), self._rotate(k), v, is_causal=True, scale=scale)
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def _rotate(self, x: torch.Tensor) -> torch.Tensor:
        """Rotary position embedding, halves rotated against each other; x (batch, heads, tokens, headdim)."""
        half = torch.arange(0, self.headdim, 2, device=x.device) / self.headdim
        angle = torch.arange(x.shape[2], device=x.device)[:, None] * self.rope_theta**-half
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
        self.attention_length = settings.attention_length
        self.self_attn = Attention(settings)
        self.feed_forward = FeedForward(settings)
        self.input_layernorm = RMSNorm(2 * settings.d_model)
        self.pre_ff_layernorm = RMSNorm(settings.d_model)

    def forward(self, hidden: torch.Tensor, embedded: torch.Tensor, call: int) -> torch.Tensor:
        """hidden, embedded (batch, tokens, d_model); rows stand one after another in the attention."""
        normed = self.input_layernorm(torch.cat([hidden, embedded], dim=-1))
        if self.training:
            normed = normed.view(-1, self.attention_length, normed.shape[-1])
        attended = self.self_attn(normed).view_as(hidden)
        return self.feed_forward(self.pre_ff_layernorm(attended), call)


class MambaDecoder(nn.Module):
    """Norm and Mamba-2 mixer on a float32 residual stream."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.mamba = Mamba2Mixer(settings)
        self.input_layernorm = RMSNorm(settings.d_model)

    def forward(
        self, hidden: torch.Tensor, seq_idx: torch.Tensor, attended: torch.Tensor | None = None
    ) -> torch.Tensor:
        """hidden (batch, tokens, d_model) float32; attended: of the same shape, added to the mixer's input only."""
        return hidden + self.mamba(self.input_layernorm(hidden if attended is None else hidden + attended), seq_idx)


class HybridLayer(nn.Module):
    """A Mamba layer whose input the shared transformer adds to."""

    def __init__(self, settings: Settings, shared_transformer: SharedTransformer | None) -> None:
        super().__init__()
        self.linear = nn.Linear(settings.d_model, settings.d_model, bias=False)
        self.mamba_decoder = MambaDecoder(settings)
        if shared_transformer is not None:
            # The first hybrid layer holds the block, as in a checkpoint; the others only call it.
            self.shared_transformer = shared_transformer

    def forward(self, hidden: torch.Tensor, seq_idx: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """hidden (batch, tokens, d_model) float32; attended: what the shared transformer returned."""
        return self.mamba_decoder(hidden, seq_idx, self.linear(attended))


class Zamba2Model(nn.Module):
    """Everything but the head."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(settings.vocabulary, settings.d_model)
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
    """A Zamba2 language model whose head is its embedding."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.model = Zamba2Model(settings)
        self.hybrid_layers = sorted(settings.hybrid_layers)

    def forward(self, tokens: torch.Tensor, seq_idx: torch.Tensor) -> torch.Tensor:
        """Logits (batch, tokens, vocabulary) after each of tokens (batch, tokens); seq_idx as in mixers.py."""
        embedded = self.model.embed_tokens(tokens)
        shared = self.model.layers[self.hybrid_layers[0]].shared_transformer
        hidden = embedded
        for index, layer in enumerate(self.model.layers):
            if index in self.hybrid_layers:
                call = self.hybrid_layers.index(index)
                hidden = layer(hidden, seq_idx, shared(hidden, embedded, call))
            else:
                hidden = layer(hidden, seq_idx)
        return F.linear(self.model.final_layernorm(hidden), self.model.embed_tokens.weight)

    def blocks(self) -> list[nn.Module]:
        """The repeated parts, which are compiled one by one: equal ones share their code."""
        return [*self.model.layers, self.model.layers[self.hybrid_layers[0]].shared_transformer]
