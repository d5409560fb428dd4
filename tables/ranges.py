"""The numbers of a table and the ranges they lie in: each check names the place, the rule and what came."""

import sys
from typing import Any

# Of a prompt: numbers of tokens are added up in int32.
MOST_TOKENS = 1 << 30
# Of a table: a row for each token of vLLM's longest default, or a row every 1000 tokens up to 131 million.
MOST_ROWS = 1 << 17
_MOST = (1 << 63) - 1


def check_budget(budget: float, place: str) -> None:
    """Raises ValueError unless budget is a finite number above 0."""
    if not _is_number(budget) or not 0 < budget <= sys.float_info.max:
        raise ValueError(
            f"{place}: budget must be a factor above 0, got {_shown(budget)}; 1 keeps what the training length has"
        )


def check_unfiltered_end(unfiltered_end: int, place: str) -> None:
    """Raises ValueError unless unfiltered_end is a number of tokens that a prompt can have."""
    _check_int(
        "unfiltered_end", unfiltered_end, place, "a number of tokens", 0, MOST_TOKENS, "0 filters all of a prompt"
    )


def check_train_length(train_length: int, place: str) -> None:
    """Raises ValueError unless train_length is a number of tokens with two to interpolate between."""
    advice = "pass the model's training length"
    _check_int("train_length", train_length, place, "a number of tokens", 2, MOST_TOKENS, advice)


def check_count(name: str, count: int, place: str) -> None:
    """Raises ValueError unless count is an integer above 0."""
    _check_int(name, count, place, "an integer", 1, _MOST, "pass how many there were")


def check_seed(seed: int, place: str) -> None:
    """Raises ValueError unless seed is an integer of 64 bits."""
    _check_int("seed", seed, place, "an integer", -_MOST - 1, _MOST, "pass the seed that chose the sequences")


def check_clamp_percent(clamp_percent: float, place: str) -> None:
    """Raises ValueError unless 0 <= clamp_percent < 100."""
    if not _is_number(clamp_percent) or not 0 <= clamp_percent < 100:
        raise ValueError(
            f"{place}: clamp_percent must lie in [0, 100), got {_shown(clamp_percent)}; the paper takes 5 or 20"
        )


def check_min_retention(min_retention: float, place: str) -> None:
    """Raises ValueError unless 0 <= min_retention <= 1."""
    if not _is_number(min_retention) or not 0 <= min_retention <= 1:
        raise ValueError(
            f"{place}: min_retention must lie in [0, 1], got {_shown(min_retention)}; the paper searches 1e-40 to 1e-1"
        )


def _check_int(name: str, value: int, place: str, what: str, low: int, high: int, advice: str) -> None:
    if isinstance(value, float) or not _is_number(value) or not low <= value <= high:
        raise ValueError(f"{place}: {name} must be {what}, {low} to {high}, got {_shown(value)}; {advice}")


def _is_number(value: Any) -> bool:
    # bool is an int in Python, but true is no number.
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    # Python refuses to write integers of more than 4300 digits.
    is_huge = isinstance(value, int) and abs(value) > _MOST
    return f"an integer of {value.bit_length()} bits" if is_huge else repr(value)
