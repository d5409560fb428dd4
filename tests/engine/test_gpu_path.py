"""What the mixers do on a GPU, run on the CPU: the same calls, each kernel's own fallback behind them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import random_token_ids
from vllm.model_executor.layers.mamba.mamba_mixer2 import MambaMixer2

from vllm_longmamba.layers import mamba1, mamba2, projections
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


SLOW = [pytest.param(family, marks=pytest.mark.slow) for family in ("zamba2", "jamba")]


@pytest.mark.parametrize("family", ["mamba1", "mamba2", "falcon_mamba", *SLOW])
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


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], list[int]]]:
    """Lets the engine keep states from within prompts; returns their offsets and where they lay among those computed.

    vLLM stores them by a Triton kernel, which this stands for.
    """
    calls = []

    def store(
        checkpoint: Any, indices: torch.Tensor, x: torch.Tensor, conv_state: torch.Tensor, states: torch.Tensor,
        ssm_state: torch.Tensor, query_start_loc: torch.Tensor, *, state_len: int,
    ) -> None:  # fmt: skip
        offsets = checkpoint.checkpoint_offsets.tolist()
        calls.append((offsets, indices.tolist()))
        for row, offset in enumerate(offsets):
            if offset > 0:
                slot, end = checkpoint.state_indices[row], query_start_loc[row] + offset
                conv_state[slot, :, :state_len] = x[:, end - state_len : end]
                ssm_state[slot] = states[indices[row]]

    monkeypatch.setattr(LongMambaMixer2, "get_kv_cache_spec", MambaMixer2.get_kv_cache_spec)
    monkeypatch.setattr(mamba2, "store_prefill_checkpoint", store)
    return calls


def test_states_from_within_prompts(
    engine: Callable[..., Any],
    tiny_model: Callable[[str], Path],
    tiny_table: Callable[[str], Any],
    stored: list[tuple[list[int], list[int]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A prompt's step also leaves the state at its last whole block, if it has one; a longer prompt starts there."""
    path, table = tiny_table("zamba2")
    running = engine("zamba2", **longmamba(path), enable_prefix_caching=True, max_num_batched_tokens=2000)
    block = running.llm.llm_engine.vllm_config.cache_config.block_size
    monkeypatch.setattr(FilteredMixer, "runs_own_kernels", lambda _: True)
    lengths = (900, block - 20, 700)
    prompts = [random_token_ids(length, seed=length) for length in lengths]
    kept = [length // block * block for length in lengths]

    ahead: list[dict[str, torch.Tensor]] = []
    monkeypatch.setattr(mamba2, "compile_ahead", lambda _, arguments, most: ahead.append(arguments))
    # no state, as in vLLM's warm-up: the kernel for one has to be compiled all the same
    running.generate([random_token_ids(20, seed=0)])
    assert not stored
    assert all(one["checkpoints"].dtype == torch.int32 for one in ahead)
    assert all(one["checkpoint_state"].dtype == one["state"].dtype for one in ahead)
    layers = len(ahead)
    assert layers > 0

    for prompt, result in zip(prompts, running.generate(prompts), strict=True):
        assert_exact(tiny_model("zamba2"), prompt, result, table)
    assert kept[1] == 0
    assert stored == [(kept, [0, 1, 2])] * layers
    assert len(ahead) == layers

    longer = [prompt + random_token_ids(12, seed=1) for prompt in prompts]
    for prompt, result, cached in zip(longer, running.generate(longer), kept, strict=True):
        assert result.cached_tokens == cached
        assert_exact(tiny_model("zamba2"), prompt, result, table)
