"""Pipeline parallelism: each stage filters its own layers. vLLM's CPU runner fails with it, so this needs two GPUs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import random_token_ids

from .conftest import longmamba
from .harness import assert_exact

pytestmark = [pytest.mark.gpu, pytest.mark.engine]


# The families whose vLLM class supports pipeline parallelism.
@pytest.mark.parametrize("family", ["mamba1", "falcon_h1", "nemotron_h"])
def test_pipeline_parallel(
    family: str, engine: Callable[..., Any], tiny_model: Callable[[str], Path], tiny_table: Callable[[str], Any]
) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    path, table = tiny_table(family)
    running = engine(family, **longmamba(path), pipeline_parallel_size=2, max_num_batched_tokens=100)
    prompts = [random_token_ids(length, seed=length) for length in (96, 101, 333, 640)]
    for prompt, result in zip(prompts, running.generate(prompts), strict=True):
        assert_exact(tiny_model(family), prompt, result, table)
