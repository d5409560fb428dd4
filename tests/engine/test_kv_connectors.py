"""States that a KV connector keeps outside the engine's cache are reused where they are the same, and only there."""

from collections.abc import Callable
from typing import Any

import pytest
from tiny_models import random_token_ids

from .conftest import longmamba
from .harness import assert_exact

pytestmark = [pytest.mark.gpu, pytest.mark.engine]


@pytest.mark.parametrize("family", ["mamba1", "mamba2", "zamba2"])
def test_offloaded_states(
    family: str, engine: Callable[..., Any], tiny_model: Callable[[str], Any], tiny_table: Callable[[str], Any]
) -> None:
    path, table = tiny_table(family)
    running = engine(
        family,
        **longmamba(path),
        enable_prefix_caching=True,
        max_num_batched_tokens=512,
        kv_offloading_size=0.25,
        kv_offloading_backend="native",
    )
    model = tiny_model(family)
    # The last row of the table serves all lengths from 600 on.
    first = random_token_ids(900, seed=1)
    assert_exact(model, first, running.generate([first])[0], table)

    same_row, other_row = first + random_token_ids(12, seed=2), first[:590]
    assert table.row_of(len(same_row)) == table.row_of(len(first)) != table.row_of(len(other_row))
    for prompt, is_shared in [(same_row, True), (other_row, False)]:
        # What is still on the GPU is forgotten; main memory is not.
        assert running.llm.reset_prefix_cache()
        result = running.generate([prompt])[0]
        assert (result.cached_tokens > 0) == is_shared
        assert_exact(model, prompt, result, table)
