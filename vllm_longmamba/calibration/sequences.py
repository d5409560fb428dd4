"""Which tokens a model is calibrated on: windows drawn from texts."""

from collections.abc import Sequence

import numpy as np


def draw_sequences(texts: Sequence[list[int]], length: int, number: int, seed: int) -> list[list[int]]:
    """Draw calibration sequences from all texts, from each in proportion to its length.

    So every seed draws the same mixture of texts. Texts that are too short for that are joined.

    Args:
        texts: tokens of each text.
        length, number, seed: see `choose_sequences`.

    Raises:
        ValueError: as `choose_sequences`, for all texts together.
    """
    windows = np.array([len(tokens) // length for tokens in texts])
    if len(texts) == 1 or windows.sum() < number:
        return choose_sequences([token for tokens in texts for token in tokens], length, number, seed)
    shares = windows * number / windows.sum()
    counts = np.floor(shares).astype(int)
    # What is left over goes to the largest remainders, the first of equal ones.
    counts[np.argsort(counts - shares, kind="stable")[: number - counts.sum()]] += 1
    drawn = [
        choose_sequences(texts[place], length, count, [seed, place]) for place, count in enumerate(counts.tolist())
    ]
    return [sequence for sequences in drawn for sequence in sequences]


def choose_sequences(tokens: list[int], length: int, number: int, seed: int | list[int]) -> list[list[int]]:
    """Choose sequences of one text: windows that do not overlap, drawn without replacement.

    Args:
        tokens: the text.
        length: tokens of a sequence.
        number: how many sequences.
        seed: the same seed gives the same sequences.

    Raises:
        ValueError: the text has fewer windows than asked for.
    """
    windows = len(tokens) // length
    if windows < number:
        raise ValueError(
            f"calibration takes {number} sequences of {length} tokens, {number * length} in all, but the text has only "
            f"{len(tokens)} tokens; give more text (--text may be repeated; for an engine that calibrates itself, "
            "the option calibration_text) or fewer --sequences"
        )
    chosen = np.random.default_rng(seed).choice(windows, size=number, replace=False)
    return [tokens[start * length : (start + 1) * length] for start in chosen.tolist()]
