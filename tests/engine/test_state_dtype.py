"""`--mamba-ssm-cache-dtype`: the state in another type than the model's moves results by rounding, and no more."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from references.reference_lm import reference_logprobs
from tiny_models import random_token_ids

from vllm_longmamba.layers.filtered_mixer import filtered_mixers

from .conftest import A_HYBRID, longmamba
from .harness import filters_of

pytestmark = pytest.mark.engine

SLOW = pytest.mark.slow
FAMILIES = [pytest.param("mamba1", marks=SLOW), "mamba2", pytest.param("zamba2", marks=SLOW), A_HYBRID]


def state_dtypes(model: Any) -> set[torch.dtype]:
    return {mixer.kv_cache[1].dtype for mixer in filtered_mixers(model)}


@pytest.mark.parametrize("family", FAMILIES)
def test_float16(
    family: str,
    engine: Callable[..., Any],
    tiny_model: Callable[[str], Path],
    tiny_table: Callable[[str], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # On such a CPU, vLLM takes float32 whatever is asked for.
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    path, table = tiny_table(family)
    running = engine(family, **longmamba(path), mamba_ssm_cache_dtype="float16", max_num_batched_tokens=64)
    assert running.llm.apply_model(state_dtypes) == [{torch.float16}]
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
