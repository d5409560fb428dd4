"""Batches of training sequences: book text with numbers stated in it, and asked for or stated again later.

All tasks are one: K distinct items are stated in order, then Q times one of them is mentioned again, as a question
with its answer or (task recall only) as the same statement once more. Digits of later mentions can be known; those of
first statements cannot, and count neither in the text loss nor in the answer loss.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812

from .books import windows
from .sentences import DIGITS, Sentences


@dataclass(frozen=True)
class Task:
    """Ranges, both ends included, of what one task puts into a sequence.

    Attributes:
        stated: how many items are stated.
        mentioned: how many mentions follow.
        questions: share of the mentions that are questions; the last one always is.
        is_passkey: the one item is the pass key. Otherwise items are needles, or, in recall, anything.
    """

    stated: tuple[int, int]
    mentioned: tuple[int, int]
    questions: float = 1.0
    is_passkey: bool = False


TASKS: dict[str, Task] = {
    "text": Task((0, 0), (0, 0)),
    "passkey": Task((1, 1), (1, 1), is_passkey=True),
    "needles": Task((2, 4), (1, 2)),
    # Many answers a sequence, at all distances: where retrieval is learnt fast.
    "recall": Task((1, 5), (2, 8), questions=0.3),
    # for evaluation
    "four_needles": Task((4, 4), (1, 1)),
}
DISTRACTOR_BYTES = 6
# First bytes of accented Latin, Greek and Cyrillic letters in UTF-8.
FOREIGN_LETTERS = torch.tensor([0xC3, 0xC4, 0xCE, 0xCF, 0xD0, 0xD1])
MAX_STATED = max(task.stated[1] for task in TASKS.values())
SLOTS = max(task.stated[1] + task.mentioned[1] for task in TASKS.values())


@dataclass(frozen=True)
class Mixture:
    """Tasks and how often each is drawn, on the device: made once, since a copy to a GPU waits for all of its work.

    Attributes:
        ranges: (tasks, 6) float32: fewest and most stated, fewest and most mentioned, questions, is_passkey.
        ends: (tasks,) float32, cumulative shares; the last is 1.
    """

    ranges: torch.Tensor
    ends: torch.Tensor


def mix_tasks(shares: Mapping[str, float], device: torch.device) -> Mixture:
    """Makes a mixture of task -> share (any positive scale).

    Raises:
        ValueError: an unknown task, or no share above 0.
    """
    if unknown := set(shares) - set(TASKS):
        raise ValueError(f"mix_tasks: shares may name {sorted(TASKS)}, got {sorted(unknown)}")
    if not sum(shares.values()) > 0:
        raise ValueError(f"mix_tasks: the shares must add up to more than 0, got {dict(shares)}")
    drawn = [(TASKS[name], share) for name, share in shares.items() if share > 0]
    ranges = [[*task.stated, *task.mentioned, task.questions, task.is_passkey] for task, _ in drawn]
    ends = torch.tensor([share for _, share in drawn]).cumsum(0)
    return Mixture(torch.tensor(ranges, dtype=torch.float32, device=device), (ends / ends[-1]).to(device))


@dataclass(frozen=True)
class Batch:
    """Sequences to train on.

    Attributes:
        tokens: (batch, length + 1) int64 bytes; inputs are all but the last, targets all but the first.
        is_answer: (batch, length + 1) bool, digits that can be known from what came before.
        is_random: (batch, length + 1) bool, digits that cannot, and letters of distractors.
    """

    tokens: torch.Tensor
    is_answer: torch.Tensor
    is_random: torch.Tensor

    def split(self, parts: int) -> "list[Batch]":
        """Cuts it into batches of equal size (which must divide)."""
        tensors = (self.tokens.chunk(parts), self.is_answer.chunk(parts), self.is_random.chunk(parts))
        return [Batch(*tensors_of_part) for tensors_of_part in zip(*tensors, strict=True)]


def make_batch(
    text: torch.Tensor,
    sentences: Sentences,
    mixture: Mixture,
    batch: int,
    length: int,
    generator: torch.Generator,
    distractors: int = 0,
    foreign_words: float = 0.0,
) -> Batch:
    """Draws sequences.

    Sentences are written over the text. Where all do not fit, the last mentions are left out; the last sentence stands
    at the end of the sequence, and the gaps before the sentences share the rest of it at random (uniformly).

    Args:
        text: (bytes,) uint8, a book.
        sentences: tables on the same device.
        mixture: tasks to draw from, on the same device.
        batch: how many sequences.
        length: inputs of each; a window of length + 1 bytes is drawn.
        generator: of the same device.
        distractors: of each sequence at most so many numbers that are never asked for are written over the text, before
            the sentences are.
        foreign_words: share of the distractors that are words of other scripts instead.
    """
    device, size = text.device, length + 1

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(shape, device=device, generator=generator)

    tokens = windows(text, batch, size, generator)
    distracting = torch.zeros_like(tokens, dtype=torch.bool)
    if distractors:
        tokens, distracting = _write_distractors(tokens, distractors, foreign_words, uniform)
    rows, numbers, known, used = _draw_sentences(sentences, mixture, batch, uniform)
    lengths = sentences.length[rows] * used  # (batch, SLOTS)
    used &= lengths.cumsum(1) <= size
    lengths *= used

    # Shares that are exponential variables over their sum are uniform on the simplex.
    gaps = -torch.log1p(-uniform(batch, SLOTS)) * used
    free = size - lengths.sum(1, keepdim=True)
    gaps = (gaps / gaps.sum(1, keepdim=True).clamp(min=1e-9) * free).floor().long()
    gaps[:, :1] += free - gaps.sum(1, keepdim=True)
    starts = (gaps + lengths).cumsum(1) - lengths

    # (batch, SLOTS, width): where each byte of each sentence goes; unused ones to a column that is cut off
    offset = torch.arange(sentences.text.shape[1], device=device)
    places = torch.where(offset < lengths[..., None], starts[..., None] + offset, size).flatten(1)
    digit = offset - sentences.digits[rows][..., None]
    is_digit = (digit >= 0) & (digit < DIGITS)
    values = numbers[..., None] // 10 ** (DIGITS - 1 - digit.clamp(0, DIGITS - 1)) % 10 + ord("0")
    written = torch.where(is_digit, values, sentences.text[rows]).flatten(1)
    # 1: can be known, 2: cannot
    kinds = torch.where(is_digit, torch.where(known, 1, 2)[..., None], 0).flatten(1)

    tokens = torch.cat([tokens, tokens[:, :1]], 1).scatter_(1, places, written)[:, :size]
    kind = F.pad(torch.where(distracting, 2, 0), (0, 1)).scatter_(1, places, kinds)[:, :size]
    return Batch(tokens, kind == 1, kind == 2)


def _write_distractors(
    tokens: torch.Tensor, most: int, foreign_words: float, uniform: Callable[..., torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Writes numbers of 1 to 6 digits, or words of 1 to 3 letters, with a space on each side over text.

    A sequence is cut into `most` parts, each of which has a distractor with a probability drawn for the sequence.

    Args:
        tokens: (batch, size) bytes.
        most: distractors in a sequence.
        foreign_words: share of words.
        uniform: random numbers of a shape.

    Returns:
        The sequences, and which of their bytes are digits and letters so written.
    """
    batch, size = tokens.shape
    part = size // most
    if part < DISTRACTOR_BYTES + 2:
        raise ValueError(
            f"make_batch: {most} distractors do not fit into sequences of {size - 1} bytes, each needs "
            f"{DISTRACTOR_BYTES + 2} of them; ask for fewer"
        )
    is_there = uniform(batch, most, 1) < uniform(batch, 1, 1)
    is_word = uniform(batch, most, 1) < foreign_words
    digits = 1 + (uniform(batch, most, 1) * DISTRACTOR_BYTES).long()
    length = torch.where(is_word, digits + digits % 2, digits)
    start = (uniform(batch, most, 1) * (part - DISTRACTOR_BYTES - 1)).long()
    place = torch.arange(part, device=tokens.device) - start
    is_written = is_there & (place >= 1) & (place <= length)
    is_space = is_there & ((place == 0) | (place == length + 1))

    # a letter: two bytes of UTF-8, the first of which tells its script
    first, numbers = FOREIGN_LETTERS.to(tokens.device), uniform(batch, most, part)
    letter = torch.where(place % 2 == 1, first[(numbers * len(first)).long()], 0x80 + (numbers * 64).long())
    value = torch.where(is_word, letter, ord("0") + (numbers * 10).long())
    text, rest = tokens.split([most * part, size - most * part], dim=1)
    written = torch.where(is_space, ord(" "), text.unflatten(1, (most, part)))
    written = torch.where(is_written, value, written).flatten(1)
    return torch.cat([written, rest], 1), F.pad(is_written.flatten(1), (0, rest.shape[1]))


def _draw_sentences(
    sentences: Sentences, mixture: Mixture, batch: int, uniform: Callable[..., torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Which sentences stand in the sequences, in order.

    Returns:
        rows, numbers, known, used: (batch, SLOTS) each; row of `sentences`, the number in it, whether it was stated
        before, whether there is a sentence at all.
    """
    task = torch.searchsorted(mixture.ends, uniform(batch), right=True).clamp(max=len(mixture.ends) - 1)
    fewest, most, fewest_mentions, most_mentions, questions, is_passkey = mixture.ranges[task].unbind(1)
    stated = (fewest + uniform(batch) * (most - fewest + 1)).long()[:, None]
    mentioned = (fewest_mentions + uniform(batch) * (most_mentions - fewest_mentions + 1)).long()[:, None]

    # Distinct items: the first few of a random order. The pass key comes first in its own task, and elsewhere only
    # where statements are repeated.
    order = uniform(batch, sentences.items)
    order[:, 0] = torch.where(is_passkey > 0, 2.0, torch.where(questions < 1, order[:, 0], -1.0))
    items = order.topk(MAX_STATED).indices
    numbers = (10 ** (DIGITS - 1) + uniform(batch, MAX_STATED) * 9 * 10 ** (DIGITS - 1)).long()

    slot = torch.arange(SLOTS, device=stated.device)
    known = slot >= stated
    drawn = (uniform(batch, SLOTS) * stated).long()
    which = torch.where(known, drawn, slot.clamp(max=MAX_STATED - 1)).clamp(max=MAX_STATED - 1)
    is_last = slot == stated + mentioned - 1
    is_question = known & (is_last | (uniform(batch, SLOTS) < questions[:, None]))
    rows = items.gather(1, which) + sentences.items * is_question
    return rows, numbers.gather(1, which), known, slot < stated + mentioned
