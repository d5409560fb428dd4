"""Requests for log-probabilities without an engine: which tokens are asked for, and which are read."""

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_longmamba.evaluate.scoring import FORCED, Scoring

TOKENS = [11, 12, 13, 14, 15]
SCORED = 2


def scoring(v2: bool, forced: bool) -> Scoring:
    return Scoring(SimpleNamespace(use_v2_model_runner=v2), forced)


def entries(tokens: list[int]) -> list[dict[int, Any] | None]:
    """As vLLM returns them: a mapping for each token but the first of a prompt, with others beside its own."""
    return [{token: SimpleNamespace(logprob=-token / 100), 0: SimpleNamespace(logprob=0.0)} for token in tokens]


def test_prompt_tokens_of_runner_v2() -> None:
    """A row of vLLM's is the prediction of the token behind it, so that the first is that of the token before."""
    asked = scoring(v2=True, forced=False)
    prompt, params = asked.ask(TOKENS, SCORED)
    assert (prompt, params.max_tokens, params.temperature) == (TOKENS, 1, 0.0)
    assert (params.prompt_logprob_start, params.prompt_logprob_token_ids.tolist()) == (2, [[14], [15]])
    output = SimpleNamespace(prompt_token_id_logprobs=[[-0.14], [-0.15]])
    assert asked.read(output, SCORED).tolist() == [-0.14, -0.15]


def test_prompt_tokens_of_runner_v1() -> None:
    asked = scoring(v2=False, forced=False)
    prompt, params = asked.ask(TOKENS, SCORED)
    assert (prompt, params.max_tokens, params.prompt_logprobs) == (TOKENS, 1, 0)
    output = SimpleNamespace(prompt_token_ids=TOKENS, prompt_logprobs=[None, *entries(TOKENS)[1:]])
    assert asked.read(output, SCORED).tolist() == [-0.14, -0.15]


@pytest.mark.parametrize("v2", [False, True])
def test_forced_tokens(v2: bool) -> None:
    """They are no part of the prompt, and all of them are generated, an end of text among them too."""
    asked = scoring(v2, forced=True)
    prompt, params = asked.ask(TOKENS, SCORED)
    assert (prompt, params.max_tokens, params.ignore_eos, params.logprobs) == (TOKENS[:3], SCORED, True, 0)
    forced = params.trace_decode_token_ids if v2 else params.extra_args[FORCED]
    assert forced == [14, 15]
    generated = SimpleNamespace(token_ids=[14, 15], logprobs=entries([14, 15]))
    output = SimpleNamespace(prompt_token_ids=prompt, prompt_logprobs=None, outputs=[generated])
    assert asked.read(output, SCORED).tolist() == [-0.14, -0.15]
