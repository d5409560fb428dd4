"""Speculative decoding of Mamba-2 models: drafts by n-grams change neither tokens nor log-probabilities.

On a CPU, vLLM's convolution keeps the inputs of rejected tokens, so that it is refused there. These tests put a plain
one in its place; everything else is what runs on a GPU, as in test_gpu_path.py.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import random_token_ids

from vllm_longmamba.engine import config
from vllm_longmamba.layers.filtered_mixer import FilteredMixer

from .conftest import longmamba
from .harness import TRAIN_LENGTH, assert_exact

pytestmark = pytest.mark.engine

FAMILIES = ["mamba2", "zamba2"]
OTHER_FAMILIES = ["granite_hybrid", "falcon_h1", "nemotron_h"]
DRAFTS = 3
NGRAMS = {"method": "ngram", "num_speculative_tokens": DRAFTS, "prompt_lookup_max": 3, "prompt_lookup_min": 1}


def convolve(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    activation: str,
    conv_state_indices: torch.Tensor,
    num_accepted_tokens: torch.Tensor,
    query_start_loc: torch.Tensor,
    max_query_len: int,
) -> torch.Tensor:
    """vLLM's `causal_conv1d_update` with drafts: a slot holds the inputs before the last step's tokens, then those."""
    assert activation == "silu"
    width, out = weight.shape[1], torch.empty_like(x)
    for sequence, slot in enumerate(conv_state_indices[:, 0].tolist()):
        start, end = query_start_loc[sequence].item(), query_start_loc[sequence + 1].item()
        accepted = int(num_accepted_tokens[sequence]) - 1
        inputs = torch.cat([conv_state[slot, :, accepted : accepted + width - 1], x[start:end].T], 1)
        summed = torch.nn.functional.conv1d(inputs[None], weight[:, None], bias, groups=len(weight))
        out[start:end] = torch.nn.functional.silu(summed[0]).T
        conv_state[slot, :, : inputs.shape[1] - 1] = inputs[:, 1:]
    return out


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        from vllm.model_executor.layers.mamba import mamba_mixer2

        monkeypatch.setattr(mamba_mixer2, "causal_conv1d_update", convolve)
        monkeypatch.setattr(FilteredMixer, "runs_own_kernels", lambda _: True)
        monkeypatch.setattr(config, "refuse_unsupported", lambda _: None)


@pytest.mark.parametrize("filters_generated", [False, True])
@pytest.mark.parametrize(
    "family", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHER_FAMILIES)]
)
def test_drafts_change_nothing(
    family: str,
    filters_generated: bool,
    engine: Callable[..., Any],
    tiny_model: Callable[[str], Path],
    tiny_table: Callable[[str], Any],
) -> None:
    path, table = tiny_table(family)
    # In chunks of 64, so that some last ones have one token, and drafts of one request meet chunks of another.
    running = engine(
        family,
        **longmamba(path, filter_generated=filters_generated),
        speculative_config=NGRAMS,
        max_num_batched_tokens=64,
        enforce_eager=not torch.cuda.is_available(),
        disable_log_stats=False,
    )
    repeated = random_token_ids(50, seed=1)
    prompts = [(repeated * 10)[:length] for length in (65, 129, 300, 450)] + [random_token_ids(193, seed=2)]
    for prompt, result in zip(prompts, running.generate(prompts, max_tokens=24), strict=True):
        assert_exact(tiny_model(family), prompt, result, table, filters_generated)
        assert result.tokens == result.logprobs.argmax(1).tolist()
    counted = {metric.name: metric for metric in running.llm.get_metrics()}
    drafted, accepted = (counted[f"vllm:spec_decode_num_{kind}_tokens"].value for kind in ("draft", "accepted"))
    assert 0 < accepted < drafted


def test_calibration_at_the_start(engine: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine with drafts makes the table that it makes without."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", os.environ.get("VLLM_CACHE_ROOT", str(Path.home() / ".cache" / "vllm")))
    options = {"model_impl": "longmamba", "additional_config": {"longmamba": {"train_length": TRAIN_LENGTH}}}
    tables = []
    for number, drafts in enumerate(({}, {"speculative_config": NGRAMS})):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / str(number)))
        running = engine("mamba2", **options, **drafts, max_model_len=1024, max_num_batched_tokens=64)
        tables.append(running.llm.llm_engine.engine_core.engine_core.longmamba_table)
    plain, with_drafts = tables
    assert plain.row_lengths.tolist() == with_drafts.row_lengths.tolist()
    for layer, thresholds in plain.layers.items():
        assert torch.equal(thresholds.dt_threshold, with_drafts.layers[layer].dt_threshold)
