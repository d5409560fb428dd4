"""Prompts whose last tokens are not filtered, on the real engine, against the independent reference in float64."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import random_token_ids

from .conftest import A_HYBRID, longmamba
from .harness import TRAIN_LENGTH, assert_exact

pytestmark = pytest.mark.engine

Engines = Callable[..., Any]
Models = Callable[[str], Path]
Tables = Callable[[str], tuple[Path, Any]]

FAMILIES = ["mamba1", "mamba2", "zamba2"]
SLOW = pytest.mark.slow
# Longer than a step of 64 or 100 tokens, so that some begin inside the end.
END = 130


def assert_the_end_matters(model: Path, prompt: list[int], result: Any, table: Any) -> None:
    """Else what equals the reference would do so with any end."""
    for other in (0, len(prompt)):
        with pytest.raises(AssertionError, match="Not equal to tolerance"):
            assert_exact(model, prompt, result, table, unfiltered_end=other)


# Steps that end between the blocks of a Mamba-2 kernel, and some that do not: both for Mamba-2 in every run.
@pytest.mark.parametrize(
    ("budget", "family"),
    [
        (64, "mamba1"),
        (64, "mamba2"),
        (100, "mamba2"),
        (100, "zamba2"),
        pytest.param(64, "zamba2", marks=SLOW),
        pytest.param(100, "mamba1", marks=SLOW),
    ],
)
def test_the_cut_of_a_prompt_does_not_matter(
    budget: int, family: str, engine: Engines, tiny_model: Models, tiny_table: Tables
) -> None:
    path, table = tiny_table(family)
    running = engine(family, **longmamba(path, unfiltered_end=END), max_num_batched_tokens=budget)
    rng = random.Random(f"{family} {budget}")
    # Alone; in the company of others, which cuts it at random; and one token over a multiple of the budget, so that
    # the end's last token runs through the decode path, or the last token before the end stands alone in its step.
    batches = [[300], [rng.randrange(2, 700) for _ in range(4)], [4 * budget + 1], [4 * budget + 1 + END]]
    # Prompts that are nothing but end, or are not filtered anyway.
    batches += [[TRAIN_LENGTH, TRAIN_LENGTH + 1, END, END + 1]]
    for lengths in batches:
        prompts = [random_token_ids(length, seed=rng.randrange(10**6)) for length in lengths]
        for prompt, result in zip(prompts, running.generate(prompts), strict=True):
            assert_exact(tiny_model(family), prompt, result, table, unfiltered_end=END)
            if lengths == [300]:
                assert_the_end_matters(tiny_model(family), prompt, result, table)


@pytest.mark.parametrize("family", [*FAMILIES, A_HYBRID])
def test_prefix_cache(family: str, engine: Engines, tiny_model: Models, tiny_table: Tables) -> None:
    path, table = tiny_table(family)
    running = engine(
        family, **longmamba(path, unfiltered_end=END), enable_prefix_caching=True, max_num_batched_tokens=300
    )
    model = tiny_model(family)

    def ask(prompt: list[int]) -> Any:
        result = running.generate([prompt])[0]
        assert_exact(model, prompt, result, table, unfiltered_end=END)
        return result

    # The last row of the table serves all lengths from 600 on.
    first = random_token_ids(900, seed=1)
    fresh = ask(first)
    assert fresh.cached_tokens == 0
    again = ask(first)
    assert 0 < again.cached_tokens <= len(first) - END

    # The same prefix in prompts of another length but the same row: it shares what lies before both ends.
    longer = first + random_token_ids(100, seed=2)
    parted = first[:800] + random_token_ids(200, seed=3)
    for prompt in (longer, parted):
        assert table.row_of(len(prompt)) == table.row_of(len(first))
        shared = ask(prompt)
        assert 0 < shared.cached_tokens <= min(len(prompt), len(first)) - END

    other_row = first[:590]
    assert table.row_of(len(other_row)) != table.row_of(len(first))
    assert ask(other_row).cached_tokens == 0


@pytest.mark.parametrize("family", ["mamba1", "mamba2", "zamba2"])
@pytest.mark.parametrize("interval", [0, None], ids=["default-retention", "all-states"])
def test_many_prompts_with_common_beginnings(
    family: str, interval: int | None, engine: Engines, tiny_model: Models, tiny_table: Tables
) -> None:
    """In batches, cut by a small step, in an order by chance; some come again."""
    path, table = tiny_table(family)
    blocks = {} if family == "zamba2" else {"mamba_block_size": 16}
    caching = {"enable_prefix_caching": True, "prefix_cache_retention_interval": interval}
    running = engine(family, **longmamba(path, unfiltered_end=END), **caching, **blocks, max_num_batched_tokens=96)
    rng = random.Random(f"{family} {interval}")
    trunk = random_token_ids(700, seed=11)
    prompts = [
        trunk[: rng.randrange(300, 700)] + random_token_ids(rng.randrange(1, 250), seed=number) for number in range(9)
    ]
    cached = 0
    for _ in range(3):
        batch = rng.sample(prompts, 5)
        for prompt, result in zip(batch, running.generate(batch), strict=True):
            assert_exact(tiny_model(family), prompt, result, table, unfiltered_end=END)
            cached += result.cached_tokens
    assert cached > 0
