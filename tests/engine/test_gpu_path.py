"""What the mixers do on a GPU, run on the CPU: the same calls, each kernel's own fallback behind them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import random_token_ids

from vllm_longmamba.layers import mamba1, projections
from vllm_longmamba.layers.filtered_mixer import FilteredMixer
from vllm_longmamba.layers.mamba2 import LongMambaMixer2

from .conftest import longmamba
from .harness import assert_exact

pytestmark = pytest.mark.engine

LENGTHS = (5, 65, 129, 300, 500)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lets the layers' products go the way that they go on a GPU; returns their tokens as they run."""
    from vllm.model_executor.layers import utils

    dispatch, small_product, tokens = utils.dispatch_cpu_unquantized_gemm, projections.small_product, []

    def keep_weight(layer: Any, remove_weight: bool) -> None:
        """On a CPU, vLLM packs weights."""
        if layer.weight.ndim == 2:
            layer.cpu_linear = torch.nn.functional.linear
        else:
            dispatch(layer, remove_weight)

    def recorded(x: torch.Tensor, *arguments: Any, **convolution: Any) -> torch.Tensor:
        tokens.append(len(x))
        return small_product(x, *arguments, **convolution)

    monkeypatch.setattr(utils, "dispatch_cpu_unquantized_gemm", keep_weight)
    for module in (mamba1, projections):
        monkeypatch.setattr(module, "unquantized_weight", lambda layer: layer.weight)
    monkeypatch.setattr(projections, "most_small_tokens", lambda _: 2)
    monkeypatch.setattr(projections, "small_product", recorded)
    monkeypatch.setattr(LongMambaMixer2, "_has_norm_kernel", lambda _: True)
    return tokens


@pytest.mark.parametrize("family", ["mamba1", "mamba2", pytest.param("zamba2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("is_filtered", [False, True])
def test_gpu_path(
    family: str,
    is_filtered: bool,
    engine: Callable[..., Any],
    tiny_model: Callable[[str], Path],
    tiny_table: Callable[[str], Any],
    products: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, table = tiny_table(family)
    options = longmamba(path) if is_filtered else longmamba()
    # In chunks of 64: initial states, and last tokens that run through the decode path.
    running = engine(family, **options, max_num_batched_tokens=64, enforce_eager=False)
    asked = []

    def runs_own_kernels(mixer: Any) -> bool:
        asked.append(mixer.layer_index)
        return True

    monkeypatch.setattr(FilteredMixer, "runs_own_kernels", runs_own_kernels)
    prompts = [random_token_ids(length, seed=length) for length in LENGTHS]
    for prompt, result in zip(prompts, running.generate(prompts), strict=True):
        assert_exact(tiny_model(family), prompt, result, table if is_filtered else None)
    assert asked
    before = len(products)
    assert_exact(tiny_model(family), prompts[1], running.generate(prompts[1:2])[0], table if is_filtered else None)
    # alone, a sequence decodes in steps of one token
    assert set(products[before:]) == {1}
