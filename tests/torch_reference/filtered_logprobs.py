"""Thresholds that filter much, and what a TorchModel says of a prompt and of tokens generated after it."""

from collections.abc import Sequence
from pathlib import Path

import torch
from references.reference_lm import reference_dt
from torch_models import TorchModel


def logprobs(model: TorchModel, tokens: Sequence[int], prompt_length: int) -> torch.Tensor:
    """(tokens, vocabulary) after each token; those from `prompt_length` on are generated, one by one."""
    reading = model.read([tokens[:prompt_length]], outputs=prompt_length)
    logits = [reading.logits[0]]
    logits += [reading.append(torch.tensor([[token]]))[0] for token in tokens[prompt_length:]]
    return torch.cat(logits).log_softmax(-1)


def quantile_thresholds(folder: Path, tokens: Sequence[int]) -> dict[int, torch.Tensor]:
    """Thresholds that filter 50 to 70 % of the tokens in every second channel of layers 0 and 2, none elsewhere."""
    thresholds = {}
    for layer in (0, 2):
        ordered = reference_dt(folder, tokens)[layer].sort(dim=0).values
        ordered = ordered[len(tokens) // 2 : len(tokens) * 7 // 10]
        # In the middle of the widest gap, so that rounding puts no token on the other side.
        gap = (ordered[1:] - ordered[:-1]).argmax(0, keepdim=True)
        thresholds[layer] = ((ordered.gather(0, gap) + ordered.gather(0, gap + 1)) / 2)[0].float()
        thresholds[layer][::2] = -1.0
    return thresholds
