"""The exactness contract (see CONTRIBUTING.md) on the real engine, against an independent reference in float64."""

import random
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from references.reference_lm import reference_dt, reference_logprobs
from tiny_models import random_token_ids

from .conftest import longmamba
from .harness import ROW_LENGTHS, TRAIN_LENGTH, Completion, assert_exact, make_table

pytestmark = pytest.mark.engine

FAMILIES = ["mamba1", "mamba2", "zamba2"]
OTHER_FAMILIES = ["falcon_mamba", "jamba", "granite_hybrid", "falcon_h1", "nemotron_h"]


@pytest.mark.parametrize("family", FAMILIES + OTHER_FAMILIES)
def test_filter_off_is_the_plain_model(
    family: str, engine: Callable[..., Any], tiny_model: Callable[[str], Path]
) -> None:
    """It starts at all: the check that no weight is missing knows tied heads, shared blocks and experts."""
    prompts = [random_token_ids(length, seed=length) for length in (1, 37, 300)]
    for prompt, result in zip(prompts, engine(family, **longmamba()).generate(prompts), strict=True):
        assert_exact(tiny_model(family), prompt, result, None)


@pytest.mark.parametrize("family", ["mamba2", "zamba2"])
def test_filter_off_gives_the_tokens_of_stock_vllm(
    family: str, engine: Callable[..., Any], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    from tiny_models import write_hf_twin

    folder = write_hf_twin(tiny_model(family), tmp_path / "twin") if family == "mamba2" else tiny_model(family)
    prompts = [random_token_ids(length, seed=length) for length in (5, 64, 300)]
    stock = engine(folder).generate(prompts)
    plain = engine(folder, **longmamba()).generate(prompts)
    for expected, result in zip(stock, plain, strict=True):
        assert result.tokens == expected.tokens
        assert abs(result.logprobs - expected.logprobs).max() < 1e-5


@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_filter_of_every_family(
    family: str, engine: Callable[..., Any], tiny_model: Callable[[str], Path], tiny_table: Callable[[str], Any]
) -> None:
    path, table = tiny_table(family)
    prompts = [random_token_ids(length, seed=length) for length in (TRAIN_LENGTH, 161, 500)]
    for prompt, result in zip(prompts, engine(family, **longmamba(path)).generate(prompts), strict=True):
        assert_exact(tiny_model(family), prompt, result, table)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("budget", [64, 100, 2048])
def test_the_cut_of_a_prompt_does_not_matter(
    family: str,
    budget: int,
    engine: Callable[..., Any],
    tiny_model: Callable[[str], Path],
    tiny_table: Callable[[str], Any],
) -> None:
    path, table = tiny_table(family)
    running = engine(family, **longmamba(path), max_num_batched_tokens=budget)
    rng = random.Random(f"{family} {budget}")
    # Alone; in the company of others, which cuts it at random; and one token over a multiple of the budget, so that
    # the last prompt token runs through the decode path.
    batches = [[300], [rng.randrange(2, 700) for _ in range(5)], [budget + 1, 2 * budget + 1, 3 * budget + 1][:2]]
    batches += [[TRAIN_LENGTH, TRAIN_LENGTH + 1, ROW_LENGTHS[-1] + 300]]
    for lengths in batches:
        prompts = [random_token_ids(length, seed=rng.randrange(10**6)) for length in lengths if length < 1500]
        for prompt, result in zip(prompts, running.generate(prompts), strict=True):
            assert_exact(tiny_model(family), prompt, result, table)


def test_min_retention_can_be_changed_at_load_time(
    engine: Callable[..., Any], tiny_model: Callable[[str], Path], tiny_table: Callable[[str], Any]
) -> None:
    path, _ = tiny_table("mamba2")
    prompt = random_token_ids(300, seed=3)
    # No channel of the table keeps more than 0.3, so none is global.
    result = engine("mamba2", **longmamba(path, min_retention=0.5)).generate([prompt])[0]
    assert_exact(tiny_model("mamba2"), prompt, result, None)


@pytest.mark.parametrize(("distance", "may_differ"), [(5e-7, True), (-5e-7, True), (1e-3, False), (-1e-3, False)])
def test_rounding_may_decide_about_a_dt_at_its_threshold(
    distance: float, may_differ: bool, tiny_model: Callable[[str], Path]
) -> None:
    """The harness itself: an "engine" that filters the prompt's last token where the table does not, or the reverse."""
    model, row, layer = tiny_model("mamba1"), 3, 0
    prompt = random_token_ids(ROW_LENGTHS[row], seed=1)
    table = make_table(model)
    at_threshold = reference_dt(model, prompt)[layer][-1]
    table.layers[layer].dt_threshold[row] = (at_threshold * (1 + distance)).float()
    filters = {layer: table.thresholds(layer)[row].double() for layer in table.layers}
    filters[layer] = (at_threshold * (1 - distance)).where(filters[layer] >= 0, -1.0)
    logprobs = reference_logprobs(model, [*prompt, 0], prompt_length=len(prompt), filters=filters)[-2:-1]
    with nullcontext() if may_differ else pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_exact(model, prompt, Completion([0], logprobs.numpy(), 0), table)
