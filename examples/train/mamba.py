"""Pure Mamba language models; parameters are named as in original state-spaces checkpoints."""

import torch
from torch import nn

from .mixers import Mamba1Mixer, Mamba2Mixer, RMSNorm
from .settings import Settings


class Block(nn.Module):
    """Norm and mixer, added to a residual stream in float32."""

    def __init__(self, mixer: nn.Module, d_model: int) -> None:
        super().__init__()
        self.mixer = mixer
        self.norm = RMSNorm(d_model)

    def forward(self, hidden: torch.Tensor, seq_idx: torch.Tensor) -> torch.Tensor:
        """hidden (batch, tokens, d_model) float32; seq_idx as in mixers.py."""
        return hidden + self.mixer(self.norm(hidden), seq_idx)


class Backbone(nn.Module):
    """Everything but the head."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.embedding = nn.Embedding(settings.vocabulary, settings.d_model)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.layers = nn.ModuleList(Block(_mixer(settings), settings.d_model) for _ in range(settings.n_layer))
        self.norm_f = RMSNorm(settings.d_model)
        with torch.no_grad():
            for layer in self.layers:
                # mamba_ssm's rescale_prenorm_residual
                layer.mixer.out_proj.weight /= settings.n_layer**0.5


class MambaLM(nn.Module):
    """A Mamba-1 or Mamba-2 language model whose head is its embedding."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.backbone = Backbone(settings)

    def forward(self, tokens: torch.Tensor, seq_idx: torch.Tensor) -> torch.Tensor:
        """Logits (batch, tokens, vocabulary) after each of tokens (batch, tokens); seq_idx as in mixers.py."""
        hidden = self.backbone.embedding(tokens)
        for layer in self.backbone.layers:
            hidden = layer(hidden, seq_idx)
        return nn.functional.linear(self.backbone.norm_f(hidden), self.backbone.embedding.weight)

    def blocks(self) -> list[nn.Module]:
        """The repeated parts, which are compiled one by one: equal ones share their code."""
        return list(self.backbone.layers)


def _mixer(settings: Settings) -> nn.Module:
    return Mamba1Mixer(settings) if settings.family == "mamba1" else Mamba2Mixer(settings)
