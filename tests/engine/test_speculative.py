"""Speculative decoding of Mamba-2 models: drafts change neither tokens nor log-probabilities.

On a CPU, vLLM's runner does not tell the layers how many drafts were accepted: tests/layers/test_draft_tokens.py does.
"""

import itertools
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from draft_kernels import DRAFTS, NGRAMS, run_as_on_a_gpu
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
    assert_some_are_accepted(running)


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_a_draft_model_changes_nothing(
    family: str,
    engine: Callable[..., Any],
    tiny_model: Callable[[str], Path],
    tiny_table: Callable[[str], Any],
    tmp_path: Path,
) -> None:
    path, table = tiny_table(family)
    # vLLM compiles the draft model for as many tokens as a step may have: a token and its drafts of every request.
    options = longmamba(path) | {"max_num_batched_tokens": 128, "enforce_eager": False, "disable_log_stats": False}
    prompts = [random_token_ids(length, seed=length) for length in (65, 129, 300, 450)]
    plain = engine(family, **options)
    without = plain.generate(prompts, max_tokens=60)
    answers = [[prompt[-1], *result.tokens] for prompt, result in zip(prompts, without, strict=True)]
    draft = write_draft_model(tmp_path / "draft", answers, plain.llm.model_config.get_vocab_size())
    config = {"method": "draft_model", "model": str(draft), "num_speculative_tokens": DRAFTS}
    running = engine(family, **options, speculative_config=config)
    for prompt, expected, result in zip(prompts, without, running.generate(prompts, max_tokens=60), strict=True):
        assert result.tokens == expected.tokens
        assert_exact(tiny_model(family), prompt, result, table)
    assert_some_are_accepted(running)


def write_draft_model(folder: Path, answers: list[list[int]], vocab_size: int) -> Path:
    """Writes a Llama that drafts, behind each token, the one that most often follows it in some answers.

    Its attention and MLP add nothing to the embeddings, which are unit vectors.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    size = -(-vocab_size // 128) * 128
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=size,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=size // 64,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    followers: dict[int, Counter[int]] = {}
    for answer in answers:
        for token, follower in itertools.pairwise(answer):
            followers.setdefault(token, Counter())[follower] += 1
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(vocab_size, size))
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        for token, counted in followers.items():
            model.lm_head.weight[counted.most_common(1)[0][0], token] = 1.0
    model.save_pretrained(folder)
    return folder


def test_draft_model(tmp_path: Path) -> None:
    """What `write_draft_model` writes, in transformers."""
    from transformers import LlamaForCausalLM

    folder = write_draft_model(tmp_path / "draft", [[7, 3, 9, 3, 9, 3, 5]], 272)
    model = LlamaForCausalLM.from_pretrained(folder)
    drafted = model(torch.tensor([[7, 3, 9]])).logits[0].argmax(-1)
    assert drafted.tolist() == [3, 9, 3]


def assert_some_are_accepted(running: Any) -> None:
    """Not all: a draft that is taken back is what can go wrong."""
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
