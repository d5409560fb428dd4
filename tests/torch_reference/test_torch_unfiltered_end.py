"""Prompts whose last tokens are not filtered: TorchModel against the slow independent reference, and against itself."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from filtered_logprobs import logprobs, quantile_thresholds
from references.reference_lm import reference_logprobs
from small_tables import small_table
from tiny_models import random_token_ids
from torch_models import LongMamba, TorchModel

from vllm_longmamba.checkpoint.fingerprint import weights_fingerprint
from vllm_longmamba.options import LongMambaOptions
from vllm_longmamba.tables import ThresholdTable, save_table

# Rounding of float32 through a whole model, against float64, and in another order of summation.
TOLERANCE = 1e-3
REORDERED = 2e-4
FAMILIES = ["mamba1", "mamba2", "falcon_mamba"]
PROMPT, GENERATED = 117, 6

Tiny = Callable[[str], Path]


def with_end(thresholds: dict[int, torch.Tensor], end: int) -> LongMamba:
    """Filters prompts of every length by the same thresholds, but not their last tokens."""
    return LongMamba({layer: threshold[None] for layer, threshold in thresholds.items()}, lambda _: 0, end)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("end", [1, 40, PROMPT - 1, PROMPT, 500])
def test_the_last_tokens_of_a_prompt_are_not_filtered(tiny: Tiny, name: str, end: int) -> None:
    tokens = random_token_ids(PROMPT + GENERATED, seed=1)
    thresholds = quantile_thresholds(tiny(name), tokens)
    expected = reference_logprobs(tiny(name), tokens, prompt_length=PROMPT, filters=thresholds, unfiltered_end=end)
    model = TorchModel(tiny(name), with_end(thresholds, end), device="cpu")
    torch.testing.assert_close(logprobs(model, tokens, PROMPT).double(), expected, rtol=0, atol=TOLERANCE)
    # The end matters, and so does what stands before it: of the longest, nothing is left to filter.
    whole = reference_logprobs(tiny(name), tokens, prompt_length=PROMPT, filters=thresholds)
    plain = reference_logprobs(tiny(name), tokens, prompt_length=PROMPT)
    assert (expected - whole).abs().max() > 10 * TOLERANCE
    assert bool((expected == plain).all()) is (end >= PROMPT)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("segment_tokens", [1, 7, 32, 45])
@pytest.mark.parametrize("by_layer", [False, True], ids=["segment by segment", "layer by layer"])
def test_segments_change_only_rounding(tiny: Tiny, name: str, segment_tokens: int, by_layer: bool) -> None:
    """Segments before, across and inside the end, which begins after 45 tokens."""
    tokens = random_token_ids(75, seed=2)
    method = with_end(quantile_thresholds(tiny(name), tokens), 30)
    method.needs_whole_prompt = by_layer
    whole = TorchModel(tiny(name), method, device="cpu").read([tokens], outputs=75)
    cut = TorchModel(tiny(name), method, device="cpu", segment_tokens=segment_tokens).read([tokens], outputs=75)
    torch.testing.assert_close(cut.logits, whole.logits, rtol=0, atol=REORDERED)


def test_scored_tokens_are_part_of_the_end(tiny: Tiny) -> None:
    tokens = random_token_ids(64, seed=5)
    thresholds = quantile_thresholds(tiny("mamba2"), tokens)
    expected = reference_logprobs(tiny("mamba2"), tokens, prompt_length=64, filters=thresholds, unfiltered_end=20)
    expected = expected[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    for segment_tokens in (5, 1024):
        model = TorchModel(tiny("mamba2"), with_end(thresholds, 20), device="cpu", segment_tokens=segment_tokens)
        for n in (1, 30, 63):
            torch.testing.assert_close(model.last_logprobs(tokens, n).double(), expected[-n:], rtol=0, atol=TOLERANCE)


@pytest.fixture
def table(tiny: Tiny) -> ThresholdTable:
    """Rows for 8 (no filter), 12, 16 and 20 tokens, an end of 5."""
    model = TorchModel(tiny("mamba2"), device="cpu")
    return small_table(layers=(0, 1, 2), channels=model.channels[0], min_retention=0.0, unfiltered_end=5)


def test_the_end_counts_for_the_row(tiny: Tiny, table: ThresholdTable) -> None:
    folder = tiny("mamba2")
    for own, end in ((None, 5), (0, 0), (9, 9)):
        model = TorchModel(folder, LongMamba.from_table(table, unfiltered_end=own), device="cpu")
        for length, row in ((8, 0), (12, 1), (15, 2), (99, 3)):
            tokens = random_token_ids(length, seed=length)
            filters = {layer: table.thresholds(layer)[row] for layer in table.layers}
            expected = reference_logprobs(folder, tokens, prompt_length=length, filters=filters, unfiltered_end=end)
            torch.testing.assert_close(logprobs(model, tokens, length).double(), expected, rtol=0, atol=TOLERANCE)


def test_for_folder_takes_the_end_of_the_options_or_the_table(
    tiny: Tiny, table: ThresholdTable, tmp_path: Path
) -> None:
    folder = tiny("mamba2")
    weights = weights_fingerprint([str(folder / "pytorch_model.bin")])
    metadata = replace(table.metadata, weights_fingerprint=weights)
    save_table(ThresholdTable(metadata, table.row_lengths, table.layers), tmp_path / "table.safetensors")
    tokens = random_token_ids(20, seed=3)
    for given, end in ((None, 5), (0, 0), (9, 9)):
        options = LongMambaOptions(str(tmp_path / "table.safetensors"), unfiltered_end=given)
        found = TorchModel(folder, LongMamba.for_folder(folder, options), device="cpu").read([tokens], outputs=20)
        expected = TorchModel(folder, LongMamba.from_table(table, None, end), device="cpu").read([tokens], outputs=20)
        assert torch.equal(found.logits, expected.logits)


def test_wrong_ends_are_refused(table: ThresholdTable) -> None:
    with pytest.raises(ValueError, match="unfiltered_end must be a number of tokens, 0 to 1073741824, got -1"):
        LongMamba.from_table(table, unfiltered_end=-1)
