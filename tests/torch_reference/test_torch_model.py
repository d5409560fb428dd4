"""TorchModel against the slow independent reference, plain and with LongMamba, and against itself."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from example_modules import EXAMPLES, load_example
from filtered_logprobs import logprobs, quantile_thresholds
from references.reference_lm import reference_logprobs
from small_tables import small_table
from tiny_models import random_token_ids
from torch_models import LongMamba, Plain, TorchModel

# Rounding of float32 through a whole model, against float64.
TOLERANCE = 1e-3
# The same numbers in another order of summation.
REORDERED = 2e-4
FAMILIES = ["mamba1", "mamba2", "falcon_mamba"]
EXAMPLE = EXAMPLES / "passkey-mamba2-4m"
TABLE = EXAMPLES.parent / "tables" / "shipped" / "passkey-mamba2-4m.safetensors"

Tiny = Callable[[str], Path]


@pytest.mark.parametrize("name", [*FAMILIES, "mamba1-safetensors", "mamba1-hf", "mamba2-hf"])
@pytest.mark.parametrize("prompt_length", [1, 3, 101])
def test_plain_model(tiny: Tiny, name: str, prompt_length: int) -> None:
    tokens = random_token_ids(prompt_length + 4, seed=prompt_length)
    expected = reference_logprobs(tiny(name), tokens, prompt_length=prompt_length)
    found = logprobs(TorchModel(tiny(name), device="cpu"), tokens, prompt_length)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", FAMILIES)
def test_thresholds_filter_the_prompt_only(tiny: Tiny, name: str) -> None:
    tokens = random_token_ids(123, seed=1)
    # The generated tokens are small dt's in part too.
    thresholds = quantile_thresholds(tiny(name), tokens)
    expected = reference_logprobs(tiny(name), tokens, prompt_length=117, filters=thresholds)
    plain = reference_logprobs(tiny(name), tokens, prompt_length=117)
    model = TorchModel(tiny(name), LongMamba.from_thresholds(thresholds), device="cpu")
    torch.testing.assert_close(logprobs(model, tokens, 117).double(), expected, rtol=0, atol=TOLERANCE)
    assert (expected - plain).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("segment_tokens", [1, 7, 32])
def test_segments_change_only_rounding(tiny: Tiny, name: str, segment_tokens: int) -> None:
    tokens = random_token_ids(75, seed=2)
    method = LongMamba.from_thresholds(quantile_thresholds(tiny(name), tokens))
    whole = TorchModel(tiny(name), method, device="cpu").read([tokens], outputs=30)
    cut = TorchModel(tiny(name), method, device="cpu", segment_tokens=segment_tokens).read([tokens], outputs=30)
    torch.testing.assert_close(cut.logits, whole.logits, rtol=0, atol=REORDERED)


def test_a_prompt_takes_the_row_of_its_length(tiny: Tiny) -> None:
    # Rows for 8 (no filter), 12, 16 and 20 tokens, thresholds 0.1, 0.2 and 0.3.
    model = TorchModel(tiny("mamba2"), device="cpu")
    table = small_table(layers=(0, 1, 2), channels=model.channels[0], min_retention=0.0)
    model = model.with_method(LongMamba.from_table(table))
    differences = []
    for length, row in ((9, 0), (12, 1), (15, 2), (99, 3)):
        tokens = random_token_ids(length, seed=length)
        thresholds = {layer: table.thresholds(layer)[row] for layer in table.layers}
        expected = reference_logprobs(tiny("mamba2"), tokens, prompt_length=length, filters=thresholds)
        torch.testing.assert_close(logprobs(model, tokens, length).double(), expected, rtol=0, atol=TOLERANCE)
        plain = reference_logprobs(tiny("mamba2"), tokens, prompt_length=length)
        differences.append(float((expected - plain).abs().max()))
    assert differences[0] == 0.0
    assert min(differences[1:]) > 100 * TOLERANCE


def test_the_example_model_with_the_table_that_the_engine_finds() -> None:
    from vllm_longmamba.tables import load_table

    table = load_table(TABLE)
    tokens = list(load_example("passkey").read_haystack().encode()[:1101])
    thresholds = {layer: table.thresholds(layer)[table.row_of(1090)] for layer in table.layers}
    expected = reference_logprobs(EXAMPLE, tokens, prompt_length=1090, filters=thresholds, unfiltered_end=256)
    found = logprobs(TorchModel(EXAMPLE, "longmamba", device="cpu"), tokens, 1090)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", FAMILIES)
def test_generate(tiny: Tiny, name: str) -> None:
    # Prompts of one length are read together, in batches of 2; none sees the others.
    prompts = [random_token_ids(length, seed=seed) for seed, length in enumerate([40, 40, 17, 40, 1])]
    model = TorchModel(tiny(name), device="cpu", segment_tokens=80)
    answers = model.generate(prompts, 6)
    for prompt, answer in zip(prompts, answers, strict=True):
        sequence = prompt + answer
        expected = reference_logprobs(tiny(name), sequence, prompt_length=len(prompt)).argmax(-1)
        assert answer == expected[len(prompt) - 1 : -1].tolist()
    assert model.generate(prompts, 0) == [[]] * 5
    stopped = model.generate(prompts, 6, stop={answers[0][2]})
    assert stopped[0] == answers[0][: answers[0].index(answers[0][2])]


def test_last_logprobs(tiny: Tiny) -> None:
    tokens = random_token_ids(64, seed=5)
    thresholds = quantile_thresholds(tiny("mamba2"), tokens)
    # The scored tokens are part of the prompt, and filtered like it.
    expected = reference_logprobs(tiny("mamba2"), tokens, prompt_length=64, filters=thresholds)
    expected = expected[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    for segment_tokens in (5, 1024):
        model = TorchModel(
            tiny("mamba2"), LongMamba.from_thresholds(thresholds), device="cpu", segment_tokens=segment_tokens
        )
        for n in (1, 12, 63):
            found = model.last_logprobs(tokens, n)
            torch.testing.assert_close(found.double(), expected[-n:], rtol=0, atol=TOLERANCE)


def test_with_method_shares_the_weights(tiny: Tiny) -> None:
    plain = TorchModel(tiny("mamba1"), device="cpu")
    other = plain.with_method(LongMamba.from_thresholds({}))
    assert other.embedding is plain.embedding
    assert isinstance(plain.method, Plain)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model.read([]), "one length of at least 1 token"),
        (lambda model: model.read([[]]), "one length of at least 1 token"),
        (lambda model: model.read([[1], [1, 2]]), r"one length of at least 1 token, got \[1, 2\]"),
        (lambda model: model.generate([[1], []], 2), "at least 1 token"),
        (lambda model: model.last_logprobs([1, 2, 3], 3), "n must lie between 1 and"),
        (lambda model: model.last_logprobs([1, 2, 3], 0), "n must lie between 1 and"),
        (lambda model: model.read([[1]], outputs=0), "outputs must be at least 1"),
        (lambda model: model.with_method(LongMamba.from_thresholds({1: torch.zeros(3)})), "layer 1 are for 3 channels"),
        (lambda model: model.with_method(LongMamba.from_thresholds({9: torch.zeros(3)})), "no such layer"),
    ],
    ids=["none", "empty", "lengths", "empty generate", "n", "n 0", "outputs", "channels", "layer"],
)
def test_refusals(tiny: Tiny, call: Callable[[TorchModel], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(TorchModel(tiny("mamba2"), device="cpu"))


def test_wrong_method_and_device(tiny: Tiny) -> None:
    with pytest.raises(ValueError, match="pass DeciMamba"):
        TorchModel(tiny("mamba2"), "decimamba", device="cpu")
    with pytest.raises(ValueError, match="device must be 'cpu' or 'cuda', got 'meta'"):
        TorchModel(tiny("mamba2"), device="meta")
    with pytest.raises(ValueError, match="no threshold table"):
        TorchModel(tiny("mamba2"), "longmamba", device="cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("name", FAMILIES)
def test_gpu_as_cpu(tiny: Tiny, name: str) -> None:
    tokens = random_token_ids(301, seed=9)
    method = LongMamba.from_thresholds(quantile_thresholds(tiny(name), tokens))
    expected = TorchModel(tiny(name), method, device="cpu").read([tokens], outputs=40).logits
    found = TorchModel(tiny(name), method, device="cuda").read([tokens], outputs=40).logits
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=TOLERANCE)
