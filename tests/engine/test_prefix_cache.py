"""With prefix caching, a state is reused where it is the same state, and only there."""

from collections.abc import Callable
from typing import Any

import pytest
from tiny_models import random_token_ids

from .conftest import A_HYBRID, longmamba
from .harness import assert_exact, completion, sampling

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("family", ["mamba1", "mamba2", "zamba2", A_HYBRID])
def test_prefix_cache(
    family: str, engine: Callable[..., Any], tiny_model: Callable[[str], Any], tiny_table: Callable[[str], Any]
) -> None:
    path, table = tiny_table(family)
    running = engine(family, **longmamba(path), enable_prefix_caching=True, max_num_batched_tokens=512)
    model = tiny_model(family)
    # The last row of the table serves all lengths from 600 on.
    first = random_token_ids(900, seed=1)

    fresh = running.generate([first])[0]
    assert fresh.cached_tokens == 0
    assert_exact(model, first, fresh, table)

    again = running.generate([first])[0]
    assert again.cached_tokens > 0
    assert_exact(model, first, again, table)

    same_row = first + random_token_ids(12, seed=2)
    assert table.row_of(len(same_row)) == table.row_of(len(first))
    shared = running.generate([same_row])[0]
    assert shared.cached_tokens > 0
    assert_exact(model, same_row, shared, table)

    other_row = first[:590]
    assert table.row_of(len(other_row)) != table.row_of(len(first))
    apart = running.generate([other_row])[0]
    assert apart.cached_tokens == 0
    assert_exact(model, other_row, apart, table)


def test_generated_tokens_are_filtered_when_they_become_prompt(
    engine: Callable[..., Any], tiny_model: Callable[[str], Any], tiny_table: Callable[[str], Any]
) -> None:
    path, table = tiny_table("mamba2")
    running = engine("mamba2", **longmamba(path), enable_prefix_caching=True, max_num_batched_tokens=512)
    turn = random_token_ids(620, seed=7)
    answer = _generate_and_cache(running, turn, 100)
    assert_exact(tiny_model("mamba2"), turn, answer, table)
    next_turn = turn + answer.tokens + random_token_ids(9, seed=8)
    assert table.row_of(len(next_turn)) == table.row_of(len(turn))
    result = running.generate([next_turn])[0]
    # States after tokens of the answer, which were not filtered, must not be taken.
    assert result.cached_tokens <= len(turn)
    assert_exact(tiny_model("mamba2"), next_turn, result, table)


def _generate_and_cache(running: Any, prompt: list[int], max_tokens: int) -> Any:
    """Generate with an interruption shortly before the end: vLLM caches the states of a resumed request's prefill."""
    llm_engine = running.llm.llm_engine
    llm_engine.add_request("0", {"prompt_token_ids": prompt}, sampling(max_tokens))
    generated = 0
    while llm_engine.has_unfinished_requests():
        outputs = llm_engine.step()
        generated += len(outputs)
        if generated == max_tokens - 5:
            generated += 1
            assert llm_engine.reset_prefix_cache(reset_running_requests=True)
    return completion(outputs[0])


def test_a_streamed_prompt_shares_no_states(
    engine: Callable[..., Any], tiny_model: Callable[[str], Any], tiny_table: Callable[[str], Any]
) -> None:
    """Its second part is filtered by the row of both, but its blocks were named when it had the first one only."""
    path, table = tiny_table("mamba2")
    # States are kept every 16 tokens.
    caching = {"enable_prefix_caching": True, "prefix_cache_retention_interval": None, "mamba_block_size": 16}
    running = engine("mamba2", **longmamba(path), **caching, max_num_batched_tokens=48)
    tokens = random_token_ids(400, seed=9)
    _stream(running, [tokens[:60], tokens[60:]])
    unfiltered = tokens[:111]
    assert table.row_of(len(unfiltered)) == 0
    assert_exact(tiny_model("mamba2"), unfiltered, running.generate([unfiltered])[0], table)


def _stream(running: Any, parts: list[list[int]]) -> None:
    """Send a prompt in parts, each when the one before is answered, as vLLM's `AsyncLLM` does."""
    core = running.llm.llm_engine.engine_core
    for part, is_last in [*((part, False) for part in parts), ([0], True)]:
        request = running.llm.llm_engine.input_processor.process_inputs(
            "streamed", {"prompt_token_ids": part}, sampling(1), ("generate",), resumable=not is_last
        )
        core.add_request(request)
        answered = is_last
        while not answered:
            answered = any(output.finish_reason is not None for output in core.get_output().outputs)
