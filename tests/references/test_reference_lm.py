"""The reference language models, against transformers, against hand-made facts, and on the trained example model."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from references.reference_lm import (
    TimeSteps,
    mamba1_mixer,
    mamba2_mixer,
    reference_dt,
    reference_logprobs,
    transformers_logprobs,
)
from tiny_models import (
    TOKENIZER,
    random_token_ids,
    write_falcon_h1,
    write_falcon_mamba,
    write_granite_hybrid,
    write_hf_twin,
    write_jamba,
    write_mamba1_original,
    write_mamba2_original,
    write_nemotron_h,
    write_zamba2,
)

WRITERS: dict[str, Callable[..., Path]] = {
    "mamba1": write_mamba1_original,
    "mamba2": write_mamba2_original,
    "falcon_mamba": write_falcon_mamba,
    "zamba2": write_zamba2,
    "jamba": write_jamba,
    "granite_hybrid": write_granite_hybrid,
    "falcon_h1": write_falcon_h1,
    "nemotron_h": write_nemotron_h,
}
MAMBA_LAYERS = {
    "mamba1": [0, 1, 2],
    "mamba2": [0, 1, 2],
    "falcon_mamba": [0, 1, 2],
    "zamba2": [0, 1, 2, 3, 4, 5],
    "jamba": [0, 2, 3],
    "granite_hybrid": [0, 2],
    "falcon_h1": [0, 1],
    "nemotron_h": [0, 3],
}
ORIGINALS = ["mamba1", "mamba2"]
PROMPT = 90
TOKENS = 101  # a prompt of 90 and 11 generated; no multiple of the chunk size of 32
TRAIN_LENGTH = 96

# Largest difference of a logprob. transformers rounds to float32 at every step, and logprobs reach -35.
FLOAT32_TOLERANCE = 1e-4
FLOAT64_TOLERANCE = 1e-9

ENGLISH = (
    "It was late in the evening when the old man came down to the harbour. The ships lay at rest upon the dark "
    "water, and the wind, which had blown from the north for three days, was still at last. He sat down upon a stone, "
    "took off his hat, and looked out to sea, as he had done every night since his son had gone away. "
    "'He will come back,' he said to himself; 'he promised me that he would, and he was never a man to break his word.'"
)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """family -> the folder of its checkpoint, written on first use; "mamba1-hf" and "mamba2-hf" are the twins."""
    root = tmp_path_factory.mktemp("tiny_models")

    def model(family: str) -> Path:
        if not (root / family).exists():
            if family.endswith("-hf"):
                write_hf_twin(model(family.removesuffix("-hf")), root / family)
            else:
                WRITERS[family](root / family)
        return root / family

    return model


def quantile_filters(dt: dict[int, torch.Tensor], share: float) -> dict[int, torch.Tensor]:
    """Thresholds that filter about `share` of the tokens; every third channel is local."""
    filters = {}
    for layer, values in dt.items():
        # Between two neighbours, so that rounding cannot move a token across.
        ordered = values.sort(dim=0).values
        index = int(share * values.shape[0])
        filters[layer] = (ordered[index] + ordered[index + 1]) / 2
        filters[layer][::3] = -1.0
    return filters


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = torch.load(path / "pytorch_model.bin", weights_only=True)
    return weights


@pytest.mark.parametrize("family", ORIGINALS)
def test_original_agrees_with_transformers(models: Callable[[str], Path], family: str) -> None:
    token_ids = random_token_ids(TOKENS)
    ours = reference_logprobs(models(family), token_ids, prompt_length=PROMPT, dtype=torch.float32)
    theirs = transformers_logprobs(models(f"{family}-hf"), token_ids, prompt_length=PROMPT)
    torch.testing.assert_close(ours, theirs, atol=FLOAT32_TOLERANCE, rtol=0)


def test_falcon_mamba_agrees_with_transformers(models: Callable[[str], Path]) -> None:
    token_ids = random_token_ids(TOKENS)
    ours = reference_logprobs(models("falcon_mamba"), token_ids, prompt_length=PROMPT, dtype=torch.float32)
    theirs = transformers_logprobs(models("falcon_mamba"), token_ids, prompt_length=PROMPT)
    torch.testing.assert_close(ours, theirs, atol=FLOAT32_TOLERANCE, rtol=0)


def test_jamba_with_our_mixer_agrees_with_transformers(models: Callable[[str], Path]) -> None:
    token_ids = random_token_ids(TOKENS)
    ours = reference_logprobs(models("jamba"), token_ids, prompt_length=PROMPT, dtype=torch.float32)
    theirs = transformers_logprobs(models("jamba"), token_ids, prompt_length=PROMPT)
    torch.testing.assert_close(ours, theirs, atol=FLOAT32_TOLERANCE, rtol=0)


def test_mamba2_mixer_with_groups_agrees_with_transformers(models: Callable[[str], Path]) -> None:
    from transformers import AutoModelForCausalLM

    path = models("nemotron_h")
    theirs = AutoModelForCausalLM.from_pretrained(path).get_submodule("model.layers.0.mixer")
    weights = {name: weight.detach() for name, weight in theirs.named_parameters()}
    hidden = torch.randn(TOKENS, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(hidden[None])[0]
    actual = mamba2_mixer(hidden, weights, 0, TimeSteps(0, {}), ngroups=2)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_filter_by_loop_equals_filter_by_hook(models: Callable[[str], Path]) -> None:
    """Two independent filters: dt = 0 in our loop over tokens; raw dt = -inf in transformers' chunked scan."""
    token_ids = random_token_ids(TOKENS)
    path = models("mamba2")
    filters = quantile_filters(reference_dt(path, token_ids), 0.7)
    ours = reference_logprobs(path, token_ids, prompt_length=PROMPT, filters=filters, dtype=torch.float32)
    theirs = transformers_logprobs(models("mamba2-hf"), token_ids, prompt_length=PROMPT, filters=filters)
    torch.testing.assert_close(ours, theirs, atol=FLOAT32_TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", ORIGINALS)
def test_twin_and_safetensors_give_the_same(models: Callable[[str], Path], tmp_path: Path, family: str) -> None:
    token_ids = random_token_ids(40)
    expected = reference_logprobs(models(family), token_ids, prompt_length=30)
    stored = WRITERS[family](tmp_path / "stored", safetensors=True)
    assert not (stored / "pytorch_model.bin").exists()
    for path in (models(f"{family}-hf"), stored):
        actual = reference_logprobs(path, token_ids, prompt_length=30)
        torch.testing.assert_close(actual, expected, atol=FLOAT64_TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", WRITERS)
def test_reference_logprobs_is_causal_and_normalised(models: Callable[[str], Path], family: str) -> None:
    path, token_ids = models(family), random_token_ids(TOKENS)
    filters = quantile_filters(reference_dt(path, token_ids), 0.6)
    whole = reference_logprobs(path, token_ids, prompt_length=PROMPT, filters=filters)
    changed = reference_logprobs(
        path, [*token_ids[:70], *random_token_ids(TOKENS - 70, seed=9)], prompt_length=PROMPT, filters=filters
    )
    # Hybrids round to float32 inside transformers.
    torch.testing.assert_close(changed[:70], whole[:70], atol=FLOAT32_TOLERANCE, rtol=0)
    assert (changed[70:] - whole[70:]).abs().mean() > 0.1
    torch.testing.assert_close(whole.logsumexp(-1), torch.zeros(TOKENS).double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", WRITERS)
def test_filter_changes_what_it_should(models: Callable[[str], Path], family: str) -> None:
    path, token_ids = models(family), random_token_ids(TOKENS)
    dt = reference_dt(path, token_ids)
    assert list(dt) == MAMBA_LAYERS[family]
    plain = reference_logprobs(path, token_ids, prompt_length=PROMPT)

    local = {layer: torch.full(values.shape[1:], -1.0) for layer, values in dt.items()}
    torch.testing.assert_close(
        reference_logprobs(path, token_ids, prompt_length=PROMPT, filters=local), plain, atol=0, rtol=0
    )
    filters = quantile_filters(dt, 0.7)
    torch.testing.assert_close(
        reference_logprobs(path, token_ids, prompt_length=0, filters=filters), plain, atol=0, rtol=0
    )
    filtered = reference_logprobs(path, token_ids, prompt_length=PROMPT, filters=filters)
    assert filtered.isfinite().all()
    assert (filtered - plain)[PROMPT:].abs().mean() > 0.1


@pytest.mark.parametrize("family", ["mamba1", "mamba2", "jamba", "zamba2"])
def test_generated_tokens_are_not_filtered(models: Callable[[str], Path], family: str) -> None:
    path, token_ids = models(family), random_token_ids(TOKENS)
    dt = reference_dt(path, token_ids)
    nothing_kept = {layer: torch.full(values.shape[1:], torch.inf) for layer, values in dt.items()}
    short = reference_logprobs(path, token_ids, prompt_length=PROMPT, filters=nothing_kept)
    longer = reference_logprobs(path, token_ids, prompt_length=PROMPT + 1, filters=nothing_kept)
    torch.testing.assert_close(longer[:PROMPT], short[:PROMPT], atol=FLOAT32_TOLERANCE, rtol=0)
    assert (longer[PROMPT] - short[PROMPT]).abs().mean() > 0.01
    # Nor is the end of a prompt where that is asked for.
    with_end = reference_logprobs(path, token_ids, prompt_length=TOKENS, filters=nothing_kept, unfiltered_end=11)
    assert torch.equal(with_end, short)


@pytest.mark.parametrize("family", ORIGINALS)
def test_infinite_threshold_leaves_only_the_skip(models: Callable[[str], Path], tmp_path: Path, family: str) -> None:
    """A layer whose tokens are all filtered equals a layer whose B is zero: y = D x."""
    path, token_ids = models(family), random_token_ids(50)
    channels = reference_dt(path, token_ids)[1].shape[1]
    filtered = reference_logprobs(path, token_ids, prompt_length=50, filters={1: torch.full((channels,), torch.inf)})

    weights = weights_of(path)
    mixer = "backbone.layers.1.mixer."
    d_inner = weights[mixer + "out_proj.weight"].shape[1]
    if family == "mamba1":
        dt_rank = weights[mixer + "dt_proj.weight"].shape[1]
        weights[mixer + "x_proj.weight"][dt_rank:] = 0.0
    else:
        weights[mixer + "conv1d.weight"][d_inner:] = 0.0
        weights[mixer + "conv1d.bias"][d_inner:] = 0.0
    torch.save(weights, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text((path / "config.json").read_text())
    expected = reference_logprobs(tmp_path, token_ids, prompt_length=50)
    torch.testing.assert_close(filtered, expected, atol=FLOAT64_TOLERANCE, rtol=0)


def test_mamba1_mixer_by_hand() -> None:
    """d_model = d_inner = 1, everything by hand: dt = softplus(w x + b), y = (dt B C x + D x) silu(z)."""
    weights = {
        "A_log": torch.tensor([[0.3]]),
        "D": torch.tensor([0.5]),
        "in_proj.weight": torch.tensor([[2.0], [1.0]]),
        "conv1d.weight": torch.tensor([[[9.0, 9.0, 9.0, 1.0]]]),
        "conv1d.bias": torch.tensor([0.0]),
        "x_proj.weight": torch.tensor([[1.0], [3.0], [4.0]]),
        "dt_proj.weight": torch.tensor([[0.7]]),
        "dt_proj.bias": torch.tensor([-1.0]),
        "out_proj.weight": torch.tensor([[1.0]]),
    }

    def silu(value: float) -> float:
        return value / (1 + math.exp(-value))

    x = silu(2.0)
    dt = math.log1p(math.exp(0.7 * x - 1))
    for threshold, kept in ((-1.0, True), (dt * 0.99, True), (dt * 1.01, False)):
        steps = TimeSteps(1, {0: torch.tensor([threshold])})
        y = mamba1_mixer(torch.ones(1, 1), weights, 0, steps)
        expected = ((dt * 3 * x * x * 4 * x if kept else 0.0) + 0.5 * x) * silu(1.0)
        assert y.item() == pytest.approx(expected, rel=1e-5)
        assert steps.dt[0].item() == pytest.approx(dt, rel=1e-5)


def test_bad_filters_are_refused(models: Callable[[str], Path]) -> None:
    path = models("mamba2")
    with pytest.raises(ValueError, match=r"layers \[7\]"):
        reference_logprobs(path, [1, 2], prompt_length=2, filters={7: torch.zeros(8)})
    with pytest.raises(ValueError, match="has 8 channels"):
        reference_logprobs(path, [1, 2], prompt_length=2, filters={0: torch.zeros(5)})


@pytest.mark.parametrize("family", ORIGINALS)
def test_original_format(models: Callable[[str], Path], tmp_path: Path, family: str) -> None:
    path = models(family)
    config, weights = json.loads((path / "config.json").read_text()), weights_of(path)
    assert not {"model_type", "architectures"} & set(config)
    assert config["vocab_size"] == 262
    assert weights["backbone.embedding.weight"].shape[0] % config["pad_vocab_size_multiple"] == 0
    assert weights["backbone.embedding.weight"].shape[0] > config["vocab_size"]
    assert weights["lm_head.weight"].data_ptr() == weights["backbone.embedding.weight"].data_ptr()
    assert (path / "tokenizer.json").exists()

    again, other = WRITERS[family](tmp_path / "again", tokenizer=False), WRITERS[family](tmp_path / "other", seed=1)
    assert not (again / "tokenizer.json").exists()
    assert all(torch.equal(weight, weights_of(again)[name]) for name, weight in weights.items())
    assert not torch.equal(weights_of(other)["backbone.embedding.weight"], weights["backbone.embedding.weight"])


@pytest.mark.parametrize("family", ORIGINALS)
def test_random_numbers_make_the_filter_matter(models: Callable[[str], Path], family: str) -> None:
    path, token_ids = models(family), random_token_ids(1000)
    weights = weights_of(path)
    for layer, dt in reference_dt(path, token_ids).items():
        A = -weights[f"backbone.layers.{layer}.mixer.A_log"].double().exp().reshape(dt.shape[1], -1)
        retention = (A * dt[:TRAIN_LENGTH].sum(0)[:, None]).exp().mean(1)
        assert 0.3 < (retention > 1e-2).double().mean() < 0.7
        assert (dt.quantile(0.9, dim=0) > 5 * dt.quantile(0.1, dim=0)).double().mean() > 0.8
    logprobs = reference_logprobs(path, token_ids, prompt_length=0)
    best, second = logprobs.topk(2).values.unbind(-1)
    assert logprobs.isfinite().all()
    assert (best - second > 0.05).double().mean() > 0.9
    assert logprobs[-100:].std() < 2 * logprobs[:100].std()


def test_example_model_knows_english() -> None:
    token_ids = list(ENGLISH.encode())
    logprobs = reference_logprobs(TOKENIZER, token_ids, prompt_length=0, dtype=torch.float32)
    bits = -logprobs[:-1].gather(1, torch.tensor(token_ids[1:])[:, None]).mean() / math.log(2)
    assert bits < 2.5
