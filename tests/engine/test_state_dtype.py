"""`--mamba-ssm-cache-dtype`: the state in another type than the model's moves results by rounding, and no more."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from references.reference_lm import reference_logprobs
from tiny_models import random_token_ids

from .conftest import A_HYBRID, longmamba
from .harness import filters_of

pytestmark = pytest.mark.engine

SLOW = pytest.mark.slow
FAMILIES = [pytest.param("mamba1", marks=SLOW), "mamba2", pytest.param("zamba2", marks=SLOW), A_HYBRID]


@pytest.mark.parametrize("family", FAMILIES)
def test_float16(
    family: str,
    engine: Callable[..., Any],
    tiny_model: Callable[[str], Path],
    tiny_table: Callable[[str], Any],
) -> None:
    path, table = tiny_table(family)
    running = engine(family, **longmamba(path), mamba_ssm_cache_dtype="float16", max_num_batched_tokens=64)
    prompt = random_token_ids(500, seed=5)
    (result,) = running.generate([prompt])
    filters = filters_of(table, len(prompt))

    def distance(of_filters: Any) -> float:
        """Largest difference of a log-probability from those of the float64 reference."""
        tokens = prompt + result.tokens
        expected = reference_logprobs(tiny_model(family), tokens, prompt_length=len(prompt), filters=of_filters)
        return float(np.abs(expected[len(prompt) - 1 : -1].numpy() - result.logprobs).max())

    # The state is rounded after each part of the prompt and each generated token, so it is not quite the same.
    assert 1e-5 < distance(filters) < 0.05 < distance({})
