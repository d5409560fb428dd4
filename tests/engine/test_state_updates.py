"""Options of vLLM that concern the state update of a decode alone leave the filter and the kernels of prompts to us."""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_models import random_token_ids, write_mamba2_original
from vllm.model_executor.layers.mamba.mamba_utils import is_conv_state_dim_first

from vllm_longmamba.layers.filtered_mixer import FilteredMixer, filtered_mixers

from .conftest import A_HYBRID, longmamba
from .harness import assert_exact, write_table

pytestmark = pytest.mark.engine

LENGTHS = (5, 65, 129, 300, 500)


def prompts() -> list[list[int]]:
    return [random_token_ids(length, seed=length) for length in LENGTHS]


@pytest.fixture(params=["SD", "DS"])
def layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """vLLM's layout of the convolution's state: (d_conv - 1, channels), or the reverse."""
    from vllm.model_executor.layers.mamba.mamba_utils import get_conv_state_layout

    monkeypatch.setenv("VLLM_SSM_CONV_STATE_LAYOUT", request.param)
    get_conv_state_layout.cache_clear()
    yield request.param
    get_conv_state_layout.cache_clear()


@pytest.mark.parametrize("family", ["mamba2", pytest.param("zamba2", marks=pytest.mark.slow)])
@pytest.mark.usefixtures("layout")
def test_prompts_by_us_and_decodes_by_vllm(
    family: str,
    engine: Callable[..., Any],
    tiny_model: Callable[[str], Path],
    tiny_table: Callable[[str], Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """As on a GPU, with another state update."""
    path, table = tiny_table(family)
    # A folder of its own, so that this engine is a new one.
    model = shutil.copytree(tiny_model(family), tmp_path / family)
    # In chunks of 64: steps with prompts and decodes, and last tokens that run through the decode path.
    running = engine(model, **longmamba(path), max_num_batched_tokens=64)
    running.llm.apply_model(_leave_updates_to_vllm)
    monkeypatch.setattr(FilteredMixer, "runs_own_kernels", lambda _: True)
    for prompt, result in zip(prompts(), running.generate(prompts()), strict=True):
        assert_exact(model, prompt, result, table)


@pytest.mark.parametrize("family", ["mamba1", "mamba2", pytest.param("zamba2", marks=pytest.mark.slow), A_HYBRID])
def test_layout_of_the_convolution(
    family: str,
    layout: str,
    engine: Callable[..., Any],
    tiny_model: Callable[[str], Path],
    tiny_table: Callable[[str], Any],
    tmp_path: Path,
) -> None:
    path, table = tiny_table(family)
    model = shutil.copytree(tiny_model(family), tmp_path / family)
    running = engine(model, **longmamba(path), max_num_batched_tokens=512, enable_prefix_caching=True)
    assert is_conv_state_dim_first() == (layout == "DS")
    asked = [random_token_ids(length, seed=length) for length in (65, 900)]
    for _ in range(2):
        for prompt, result in zip(asked, running.generate(asked), strict=True):
            assert_exact(model, prompt, result, table)
    assert result.cached_tokens > 0


@pytest.mark.gpu
@pytest.mark.parametrize("rounding", [False, True])
def test_flashinfer(rounding: bool, engine: Callable[..., Any], tmp_path: Path) -> None:
    """With sizes that FlashInfer has. A rounded state changes what follows the first token."""
    pytest.importorskip("flashinfer")
    model = write_mamba2_original(tmp_path / "model", d_state=128, headdim=64, d_model=128)
    table = write_table(model, tmp_path / "table.safetensors")
    options: dict[str, Any] = {"mamba_backend": "flashinfer", "enforce_eager": False}
    if rounding:
        options |= {"enable_mamba_cache_stochastic_rounding": True, "mamba_ssm_cache_dtype": "float16"}
    for prompt, result in zip(
        prompts(),
        engine(model, **longmamba(tmp_path / "table.safetensors"), **options).generate(prompts()),
        strict=True,
    ):
        if rounding:
            result = replace(result, tokens=result.tokens[:1], logprobs=result.logprobs[:1])
        assert_exact(model, prompt, result, table)


@pytest.mark.gpu
@pytest.mark.skipif(os.environ.get("VLLM_USE_V2_MODEL_RUNNER") != "0", reason="needs model runner V1")
def test_replayssm(
    engine: Callable[..., Any], tiny_model: Callable[[str], Path], tiny_table: Callable[[str], Any]
) -> None:
    """vLLM has it for Nemotron-H alone. FlashInfer's, for model runner V2, takes 16-bit inputs only."""
    path, table = tiny_table("nemotron_h")
    running = engine(
        "nemotron_h",
        **longmamba(path),
        use_replayssm=True,
        max_num_batched_tokens=64,
        enforce_eager=False,
    )
    # More tokens than the ring holds.
    for prompt, result in zip(prompts(), running.generate(prompts(), max_tokens=40), strict=True):
        assert_exact(tiny_model("nemotron_h"), prompt, result, table)


def _leave_updates_to_vllm(model: Any) -> None:
    for mixer in filtered_mixers(model):
        mixer._updates_state = False
