"""The numbers of a table and the ranges they lie in."""

import math
import sys
from typing import Any

# Of a prompt: numbers of tokens are added up in int32.
MOST_TOKENS = 1 << 30
# Of a table: a row for each token of vLLM's longest default, or a row every 1000 tokens up to 131 million.
MOST_ROWS = 1 << 17
_MOST = (1 << 63) - 1

_INTEGERS = ("train_length", "unfiltered_end", "num_sequences", "seed")
# Name -> the lowest and the highest, what it must be, and what to do.
_RANGES: dict[str, tuple[float, float, str, str]] = {
    # Two tokens to interpolate between.
    "train_length": (2, MOST_TOKENS, f"be a number of tokens, 2 to {MOST_TOKENS}", "pass the model's training length"),
    "unfiltered_end": (0, MOST_TOKENS, f"be a number of tokens, 0 to {MOST_TOKENS}", "0 filters all of a prompt"),
    "num_sequences": (1, _MOST, f"be an integer, 1 to {_MOST}", "pass how many there were"),
    "seed": (-_MOST - 1, _MOST, f"be an integer, {-_MOST - 1} to {_MOST}", "pass the seed that chose the sequences"),
    "budget": (math.nextafter(0, 1), sys.float_info.max, "be a factor above 0", "1 keeps what the training length has"),
    "clamp_percent": (0, math.nextafter(100, 0), "lie in [0, 100)", "the paper takes 5 or 20"),
    "min_retention": (0, 1, "lie in [0, 1]", "the paper searches 1e-40 to 1e-1"),
}


def check_range(name: str, value: Any, place: str) -> None:
    """Raises ValueError unless a number of a table is of its type and lies in its range.

    Args:
        name: train_length, unfiltered_end, num_sequences, seed, budget, clamp_percent or min_retention.
        value: what came.
        place: who asks, for the message.
    """
    low, high, rule, advice = _RANGES[name]
    # bool is an int in Python, but true is no number.
    is_number = isinstance(value, int if name in _INTEGERS else (int, float)) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:
        # Python refuses to write integers of more than 4300 digits.
        is_huge = isinstance(value, int) and abs(value) > _MOST
        shown = f"an integer of {value.bit_length()} bits" if is_huge else repr(value)
        raise ValueError(f"{place}: {name} must {rule}, got {shown}; {advice}")
