"""A request that is preempted and prefilled again over prompt and generated tokens gives the same result."""

from collections.abc import Callable
from typing import Any

import pytest
from tiny_models import random_token_ids

from .conftest import longmamba
from .harness import assert_exact, completion, sampling

pytestmark = pytest.mark.engine


@pytest.mark.parametrize(
    ("family", "filters_generated", "unfiltered_end"),
    [
        ("mamba1", False, 0),
        ("mamba2", False, 0),
        ("zamba2", False, 0),
        # Which tokens are filtered is decided for both mixers in one place.
        pytest.param("mamba1", True, 0, marks=pytest.mark.slow),
        ("mamba2", True, 0),
        ("mamba2", False, 60),
        pytest.param("granite_hybrid", False, 0, marks=pytest.mark.slow),
    ],
)
def test_a_resumed_request_is_filtered_as_before(
    family: str,
    filters_generated: bool,
    unfiltered_end: int,
    engine: Callable[..., Any],
    tiny_model: Callable[[str], Any],
    tiny_table: Callable[[str], Any],
) -> None:
    path, table = tiny_table(family)
    options = longmamba(path, filter_generated=filters_generated, unfiltered_end=unfiltered_end)
    running = engine(family, **options, max_num_batched_tokens=100).llm.llm_engine
    prompts = [random_token_ids(length, seed=length) for length in (150, 333)]
    for number, prompt in enumerate(prompts):
        running.add_request(str(number), {"prompt_token_ids": prompt}, sampling(40))
    scheduler = running.engine_core.engine_core.scheduler
    finished: dict[str, Any] = {}
    preempted = 0
    for step in range(400):
        for output in running.step():
            if output.finished:
                finished[output.request_id] = output
        if not running.has_unfinished_requests():
            break
        if step in (3, 20, 30):
            # Once amid the prefill, twice amid the generation.
            assert running.reset_prefix_cache(reset_running_requests=True)
            preempted += sum(request.num_preemptions > 0 for request in scheduler.requests.values())
    assert preempted > 0
    for number, prompt in enumerate(prompts):
        result = completion(finished[str(number)])
        assert_exact(tiny_model(family), prompt, result, table, filters_generated, unfiltered_end)
