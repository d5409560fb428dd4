"""What a request can ask for beside greedy tokens: logprobs of its prompt, beams, an answer of a given form."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from references.reference_lm import reference_logprobs
from tiny_models import random_token_ids

from .conftest import A_HYBRID, longmamba
from .harness import Filters, assert_agrees, filters_of

pytestmark = pytest.mark.engine

FAMILIES = ["mamba1", "zamba2", pytest.param("mamba2", marks=pytest.mark.slow), A_HYBRID]
# All tests of a family follow each other, on one engine.
by_family = pytest.mark.parametrize("family", FAMILIES, scope="module")
PROMPT = random_token_ids(200, seed=1)
BEAMS, BEAM_TOKENS = 2, 3


@pytest.fixture
def ask(
    engine: Callable[..., Any], tiny_model: Callable[[str], Path], tiny_table: Callable[[str], Any]
) -> Callable[[str], tuple[Any, Callable[..., Callable[[Filters], np.ndarray]], Filters]]:
    """Function: family -> its engine, a reference of (prompt, tokens), and the filters of `PROMPT`."""

    def start(family: str) -> Any:
        path, table = tiny_table(family)
        # Prompts in parts, as users have them.
        running = engine(family, **longmamba(path), skip_tokenizer_init=False, max_num_batched_tokens=64)
        filters = filters_of(table, len(PROMPT))

        def reference(prompt_length: int, tokens: list[int]) -> Callable[[Filters], np.ndarray]:
            """(tokens, vocabulary): log-probabilities after each token."""
            return lambda shifted: reference_logprobs(
                tiny_model(family), tokens, prompt_length=prompt_length, filters=shifted
            ).numpy()

        return running.llm, reference, filters

    return start


@by_family
def test_prompt_logprobs(family: str, ask: Callable[..., Any]) -> None:
    from vllm import SamplingParams

    llm, reference, filters = ask(family)
    sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
    (output,) = llm.generate({"prompt_token_ids": PROMPT}, sampling, use_tqdm=False)
    given = [entries[token].logprob for token, entries in zip(PROMPT[1:], output.prompt_logprobs[1:], strict=True)]

    def expected(shifted: Filters) -> np.ndarray:
        return reference(len(PROMPT), PROMPT)(shifted)[np.arange(len(PROMPT) - 1), PROMPT[1:]]

    assert_agrees(np.array(given), expected, filters)


@by_family
def test_beam_search(family: str, ask: Callable[..., Any]) -> None:
    """vLLM sends each beam as a prompt, so all of its tokens but the last were filtered."""
    from vllm.sampling_params import BeamSearchParams

    llm, reference, filters = ask(family)
    search = BeamSearchParams(beam_width=BEAMS, max_tokens=BEAM_TOKENS, ignore_eos=True)
    (output,) = llm.beam_search([{"prompt_token_ids": PROMPT}], search)
    assert len(output.sequences) == BEAMS
    for beam in output.sequences:
        tokens = beam.tokens
        assert tokens[: len(PROMPT)] == PROMPT
        assert len(tokens) == len(PROMPT) + BEAM_TOKENS

        def expected(shifted: Filters, tokens: list[int] = tokens) -> np.ndarray:
            steps = range(len(PROMPT), len(tokens))
            return np.array([reference(end, tokens[:end])(shifted)[-1, tokens[end]] for end in steps])

        assert_agrees(np.array(beam_logprobs(beam)), expected, filters)


def beam_logprobs(beam: Any) -> list[float]:
    """Of its generated tokens."""
    return [entries[token].logprob for token, entries in zip(beam.tokens[-BEAM_TOKENS:], beam.logprobs, strict=True)]


@by_family
def test_structured_output(family: str, ask: Callable[..., Any]) -> None:
    """Of the answers that are allowed, the one that the filtered model thinks likeliest at its first character."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    llm, reference, filters = ask(family)
    choices = ["ab", "cd", "ef"]
    sampling = SamplingParams(max_tokens=4, temperature=0.0, structured_outputs=StructuredOutputsParams(choice=choices))
    (output,) = llm.generate({"prompt_token_ids": PROMPT}, sampling, use_tqdm=False)
    last = reference(len(PROMPT), PROMPT)(filters)[-1]
    # Of the prompt's random bytes the detokenizer makes text that changes with the answer.
    answer = bytes(token for token in output.outputs[0].token_ids if token < 256).decode()
    assert answer == max(choices, key=lambda choice: last[ord(choice[0])])
