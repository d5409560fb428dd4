"""Speculative decoding of Mamba-2 models: drafts by n-grams change neither tokens nor log-probabilities.

On a CPU, vLLM's runner does not tell the layers how many drafts were accepted: tests/layers/test_draft_tokens.py does.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from draft_kernels import NGRAMS, run_as_on_a_gpu
from tiny_models import random_token_ids

from .conftest import longmamba
from .harness import TRAIN_LENGTH, assert_exact

pytestmark = pytest.mark.engine

FAMILIES = ["mamba2", "zamba2", "granite_hybrid", "falcon_h1", "nemotron_h"]


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        run_as_on_a_gpu(monkeypatch)


@pytest.mark.gpu
@pytest.mark.parametrize("filters_generated", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
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
        enforce_eager=False,
        disable_log_stats=False,
    )
    repeated = random_token_ids(50, seed=1)
    prompts = [(repeated * 10)[:length] for length in (65, 129, 300, 450)] + [random_token_ids(193, seed=2)]
    for prompt, result in zip(prompts, running.generate(prompts, max_tokens=120), strict=True):
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
