"""The sentences of the tasks as tables of bytes, so that a whole batch is written on the GPU at once.

The wording is that of vllm_longmamba/evaluate/needles.py, which this package does not import: it needs no installation.
"""

from dataclasses import dataclass

import torch

DIGITS = 5
PASSKEY_STATEMENT = "\nThe pass key is 00000. Remember it.\n"
PASSKEY_QUESTION = "\nWhat is the pass key? The pass key is 00000\n"
NEEDLE_STATEMENT = "\nThe magic number of the {name} is 00000.\n"
NEEDLE_QUESTION = "\nWhat is the magic number of the {name}? The magic number of the {name} is 00000\n"


@dataclass(frozen=True)
class Sentences:
    """Sentence s of item i stands in row `s * items + i`; s = 0 states the number, s = 1 asks for it and answers.

    Item 0 is the pass key; the others are the names of needles.

    Attributes:
        items: how many items there are.
        text: (2 * items, width) int64 bytes, with zeros for the digits; behind the end anything.
        length: (2 * items,) int64 bytes of a sentence.
        digits: (2 * items,) int64 offset of the first of the five digits.
    """

    items: int
    text: torch.Tensor
    length: torch.Tensor
    digits: torch.Tensor


def write_sentences(names: tuple[str, ...], device: torch.device) -> Sentences:
    """Makes the tables for the pass key and needles of the given names."""
    rows = [PASSKEY_STATEMENT, *(NEEDLE_STATEMENT.format(name=name) for name in names)]
    rows += [PASSKEY_QUESTION, *(NEEDLE_QUESTION.format(name=name) for name in names)]
    width = max(map(len, rows))
    return Sentences(
        items=1 + len(names),
        text=torch.tensor([list(row.ljust(width).encode("ascii")) for row in rows], device=device),
        length=torch.tensor([len(row) for row in rows], device=device),
        digits=torch.tensor([row.index("0" * DIGITS) for row in rows], device=device),
    )
