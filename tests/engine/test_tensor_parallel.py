"""Tensor parallelism: each rank filters its own channels with its own slice of the table. Also with experts apart."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import random_token_ids

from .conftest import WRITERS, longmamba
from .harness import assert_exact

SLOW = pytest.mark.slow
pytestmark = pytest.mark.engine


@pytest.fixture
def _two_places(monkeypatch: pytest.MonkeyPatch) -> None:
    places = torch.cuda.device_count() if torch.cuda.is_available() else (os.cpu_count() or 1)
    if places < 2:
        pytest.skip("needs two GPUs or two CPU cores")
    # Without this, vLLM wants a NUMA node for each rank.
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")


TWO_RANKS = {"tensor_parallel_size": 2, "max_num_batched_tokens": 100}
FAMILIES = [pytest.param(family, marks=() if family == "mamba2" else SLOW) for family in WRITERS]


@pytest.mark.usefixtures("_two_places")
@pytest.mark.parametrize("family", FAMILIES)
def test_tensor_parallel(
    family: str, engine: Callable[..., Any], tiny_model: Callable[[str], Path], tiny_table: Callable[[str], Any]
) -> None:
    path, table = tiny_table(family)
    assert_two_ranks_are_exact(engine(family, **longmamba(path), **TWO_RANKS), tiny_model(family), table)


def assert_two_ranks_are_exact(running: Any, model: Path, table: Any) -> None:
    prompts = [random_token_ids(length, seed=length) for length in (96, 101, 333, 640)]
    for prompt, result in zip(prompts, running.generate(prompts), strict=True):
        assert_exact(model, prompt, result, table)


@pytest.mark.gpu
@pytest.mark.usefixtures("_two_places")
def test_expert_parallel(
    engine: Callable[..., Any], tiny_model: Callable[[str], Path], tiny_table: Callable[[str], Any]
) -> None:
    """Each rank has two of a layer's four experts. On a CPU it is refused."""
    path, table = tiny_table("jamba")
    running = engine("jamba", **longmamba(path), **TWO_RANKS, enable_expert_parallel=True)
    assert_two_ranks_are_exact(running, tiny_model("jamba"), table)
