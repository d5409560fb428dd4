"""Which parameter is optimised how, and the learning rate over the training."""

import math

import torch
from torch import nn

from .settings import Settings


def make_optimizer(model: nn.Module, settings: Settings) -> torch.optim.AdamW:
    """AdamW, with weight decay for the matrices of the blocks."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.dim() == 2 and not name.endswith("A_log") and "embed" not in name
        (matrices if is_matrix else others).append(parameter)
    groups = [{"params": others, "weight_decay": 0.0}, {"params": matrices, "weight_decay": settings.weight_decay}]
    return torch.optim.AdamW(groups, lr=settings.peak_lr, betas=(0.9, 0.95), fused=next(model.parameters()).is_cuda)


def learning_rate(settings: Settings, step: int, progress: float) -> float:
    """Linear over the first steps, then a cosine over the whole training.

    Args:
        step: steps done.
        progress: share of the training done, 0 to 1.
    """
    cosine = (1 + math.cos(math.pi * min(progress, 1.0))) / 2
    share = settings.final_lr_share + (1 - settings.final_lr_share) * cosine
    return settings.peak_lr * share * min(1.0, (step + 1) / settings.warmup_steps)
