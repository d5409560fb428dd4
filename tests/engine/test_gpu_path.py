"""What the mixers do on a GPU, run on the CPU: the same calls, each kernel's own fallback behind them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import random_token_ids

from vllm_longmamba.layers import mamba1
from vllm_longmamba.layers.filtered_mixer import FilteredMixer

from .conftest import longmamba
from .harness import assert_exact

pytestmark = pytest.mark.engine

LENGTHS = (5, 65, 129, 300, 500)


@pytest.mark.parametrize("family", ["mamba1", "mamba2", pytest.param("zamba2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("is_filtered", [False, True])
def test_gpu_path(
    family: str,
    is_filtered: bool,
    engine: Callable[..., Any],
    tiny_model: Callable[[str], Path],
    tiny_table: Callable[[str], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, table = tiny_table(family)
    options = longmamba(path) if is_filtered else longmamba()
    # In chunks of 64: initial states, and last tokens that run through the decode path.
    running = engine(family, **options, max_num_batched_tokens=64)
    asked = []

    def runs_own_kernels(mixer: Any) -> bool:
        asked.append(mixer.layer_index)
        return True

    monkeypatch.setattr(FilteredMixer, "runs_own_kernels", runs_own_kernels)
    # On a CPU, vLLM packs the weight of dt_proj, which an update of few tokens would read.
    monkeypatch.setattr(mamba1, "MOST_PROJECTED", 0)
    prompts = [random_token_ids(length, seed=length) for length in LENGTHS]
    for prompt, result in zip(prompts, running.generate(prompts), strict=True):
        assert_exact(tiny_model(family), prompt, result, table if is_filtered else None)
    assert asked
