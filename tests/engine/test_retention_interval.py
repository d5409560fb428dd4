"""`--prefix-cache-retention-interval`: states amid a prompt are reused where they are the same, and only there."""

from collections.abc import Callable
from typing import Any

import pytest
from tiny_models import random_token_ids

from .conftest import A_HYBRID, longmamba
from .harness import assert_exact

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("family", ["mamba1", "mamba2", "zamba2", A_HYBRID])
def test_prefix_cache(
    family: str, engine: Callable[..., Any], tiny_model: Callable[[str], Any], tiny_table: Callable[[str], Any]
) -> None:
    path, table = tiny_table(family)
    # None keeps the state behind each step; by default vLLM keeps the one at a prompt's last block.
    caching = {"enable_prefix_caching": True, "prefix_cache_retention_interval": None}
    running = engine(family, **longmamba(path), **caching, max_num_batched_tokens=300)

    def cached(prompt: list[int]) -> int:
        result = running.generate([prompt])[0]
        assert_exact(tiny_model(family), prompt, result, table)
        tokens: int = result.cached_tokens
        return tokens

    # The last row of the table serves all lengths from 600 on.
    first = random_token_ids(900, seed=1)
    assert cached(first) == 0
    # Neither reaches the last block of the first prompt.
    for prompt, shared in ((first[:800] + random_token_ids(200, seed=3), 800), (first[:690], 690)):
        assert table.row_of(len(prompt)) == table.row_of(len(first))
        assert 300 < cached(prompt) <= shared
    other_row = first[:590]
    assert table.row_of(len(other_row)) != table.row_of(len(first))
    assert cached(other_row) == 0
