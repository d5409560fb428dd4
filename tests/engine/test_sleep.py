"""vLLM's sleep mode frees the memory of weights and states: awake again, the engine filters as before."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import random_token_ids

from .conftest import longmamba
from .harness import assert_exact

pytestmark = [pytest.mark.gpu, pytest.mark.engine]


@pytest.mark.parametrize("family", ["mamba1", "mamba2", "zamba2", "granite_hybrid"])
@pytest.mark.parametrize("level", [1, 2])
def test_thresholds_survive(
    level: int,
    family: str,
    engine: Callable[..., Any],
    tiny_model: Callable[[str], Path],
    tiny_table: Callable[[str], Any],
) -> None:
    """Level 1 keeps the weights in host memory; level 2 drops them, and they are read from the checkpoint again."""
    path, table = tiny_table(family)
    # Graphs read thresholds and rows where they were before; vLLM knows one engine with sleep mode per process.
    running = engine(family, **longmamba(path), enforce_eager=False, enable_sleep_mode=True, max_num_batched_tokens=64)
    # Last chunks of one token are filtered in the decode graph, generated tokens are not.
    prompts = [random_token_ids(length, seed=level) for length in (65, 129, 193, 300)]
    running.generate(prompts)
    running.llm.sleep(level=level)
    running.llm.wake_up(tags=["weights"])
    if level == 2:
        running.llm.collective_rpc("reload_weights")
    running.llm.wake_up(tags=["kv_cache"])
    for prompt, result in zip(prompts, running.generate(prompts, max_tokens=12), strict=True):
        assert_exact(tiny_model(family), prompt, result, table)
