"""Models whose dt is clamped: vLLM's Mamba layers clamp nothing, and would run them as other models without a word."""

import math
from typing import Any


def check_time_step_limit(limit: Any, name: str) -> None:
    """Refuses a model whose dt has bounds, in the original format and in that of Hugging Face alike.

    Args:
        limit: the smallest and the largest dt after softplus, as config.json gives them; None stands for no bounds.
        name: the field of config.json.

    Raises:
        ValueError: a bound other than 0 and infinity, or no pair of numbers.
    """
    if limit is None:
        return
    bounds = [_number(value) for value in limit] if isinstance(limit, (list, tuple)) else []
    if bounds != [0.0, math.inf]:
        raise ValueError(
            f"config.json: {name} must be [0, infinity], because vLLM's Mamba layers do not clamp dt, but is "
            f"{limit!r}; run this model with another engine, such as transformers"
        )


def _number(value: Any) -> Any:
    """transformers writes infinity as {"__float__": "Infinity"}."""
    try:
        return float(value["__float__"] if isinstance(value, dict) else value)
    except (KeyError, TypeError, ValueError, OverflowError):
        return value
