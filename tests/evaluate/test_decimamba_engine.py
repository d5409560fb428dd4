"""DeciMamba through the real engine on the example models: the answers and log-probabilities of the torch reference."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from engine.harness import EAGER, LOGPROB_TOLERANCE
from example_modules import EXAMPLES
from torch_models import DeciMamba, TorchModel

from vllm_longmamba.evaluate.engine import EngineContestant, EngineRunner
from vllm_longmamba.evaluate.needles import ANSWER_TOKENS, middles, passkey_questions
from vllm_longmamba.evaluate.texts import Encoder

pytestmark = pytest.mark.engine

SETTINGS: dict[str, dict[str, Any]] = {
    "passkey-mamba2-4m": {"layers": [6], "L_base": 1024, "score": "norm"},
    "reference-mamba1-4m": {"layers": [3], "L_base": 512, "score": "mean"},
}
LENGTHS = (512, 2048)
SCORED = 40


@dataclass(frozen=True)
class Sides:
    """One model on both sides, and a text."""

    engine: EngineRunner
    reference: TorchModel
    encoder: Encoder
    haystack: list[int]


@pytest.fixture(scope="module", params=SETTINGS)
def sides(request: pytest.FixtureRequest) -> Iterator[Sides]:
    folder, settings = EXAMPLES / request.param, SETTINGS[request.param]
    arguments = {"model": str(folder), "dtype": "float32", "max_model_len": LENGTHS[-1] + ANSWER_TOKENS, **EAGER}
    contestant = EngineContestant({**arguments, "additional_config": {"decimamba": settings}}, "decimamba")
    assert contestant.description["decimamba"] == DeciMamba(**settings).to_dict() | {"cut_prompts": False}
    haystack = contestant.encoder.encode((EXAMPLES / "texts" / "haystack.txt").read_text())
    with contestant.start() as runner:
        yield Sides(runner, TorchModel(folder, DeciMamba(**settings)), contestant.encoder, haystack)


def test_the_same_keys_are_found(sides: Sides) -> None:
    questions = list(passkey_questions(LENGTHS, middles(4), [0]))
    prompts = [sides.encoder.prompt(question, sides.haystack) for question in questions]
    answers = dict(sides.engine.complete((n, prompt, ANSWER_TOKENS) for n, prompt in enumerate(prompts)))
    expected = [sides.encoder.decode(tokens) for tokens in sides.reference.generate(prompts, ANSWER_TOKENS)]
    assert [answers[n] for n in range(len(prompts))] == expected
    found = [question.found_in(answer) for question, answer in zip(questions, expected, strict=True)]
    assert 4 <= sum(found) < len(found)


def test_the_same_text_costs_the_same(sides: Sides) -> None:
    texts = [sides.haystack[5000 : 5000 + length] for length in (300, *LENGTHS)]
    scored = dict(sides.engine.tail_logprobs(enumerate(texts), SCORED))
    plain = TorchModel.with_method(sides.reference, DeciMamba((0,), LENGTHS[-1]))
    for number, text in enumerate(texts):
        expected = sides.reference.last_logprobs(text, SCORED).double().numpy()
        np.testing.assert_allclose(scored[number], expected, rtol=0, atol=LOGPROB_TOLERANCE)
    kept = plain.last_logprobs(texts[-1], SCORED)
    assert float((kept - torch.from_numpy(scored[2])).abs().max()) > 10 * LOGPROB_TOLERANCE


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "no settings are published"),
        ({"layer": [3]}, "unknown option layer"),
        ({"layers": [99], "L_base": 9}, "99"),
    ],
)
def test_wrong_settings_are_refused_before_a_start(settings: dict[str, Any], message: str) -> None:
    config = {"longmamba": {"filter": False}, **({"decimamba": settings} if settings else {})}
    arguments = {"model": str(EXAMPLES / "passkey-mamba2-4m"), "additional_config": config}
    with pytest.raises(ValueError, match=message):
        EngineContestant(arguments, "decimamba")
