"""The training text: books as one tensor of bytes on the training device."""

import lzma
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

SEPARATOR = b"<|doc|>\n"


@dataclass(frozen=True)
class Books:
    """Bytes to train on and bytes kept apart.

    Attributes:
        train: (bytes,) uint8.
        held_out: (bytes,) uint8, the end of the text, for the loss on unseen text.
    """

    train: torch.Tensor
    held_out: torch.Tensor


def read_books(path: Path, device: torch.device, held_out_bytes: int = 1_000_000) -> Books:
    """Reads a text file, compressed with xz or not, whose documents are separated by lines `<|doc|>`.

    The separators are dropped: books of some hundred thousand bytes make a boundary inside a sequence rare.

    Args:
        path: the file; .xz is unpacked in memory.
        device: where the tensors shall lie.
        held_out_bytes: taken from the end; at most a tenth of the text.

    Raises:
        ValueError: fewer than 10,000 bytes of text.
    """
    packed = path.read_bytes()
    text = (lzma.decompress(packed) if path.suffix == ".xz" else packed).replace(SEPARATOR, b"")
    if len(text) < 10_000:
        raise ValueError(f"{path}: the training text must have at least 10,000 bytes, got {len(text)}")
    everything = torch.from_numpy(np.frombuffer(text, dtype=np.uint8).copy()).to(device)
    split = len(text) - min(held_out_bytes, len(text) // 10)
    return Books(everything[:split], everything[split:])


def windows(text: torch.Tensor, count: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """Cuts `count` random windows of `length` bytes out of a text (bytes,): (count, length) int64."""
    start = torch.randint(0, len(text) - length, (count, 1), device=text.device, generator=generator)
    return text[start + torch.arange(length, device=text.device)].long()
