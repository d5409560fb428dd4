"""DeciMamba as users run it: compiled, in the model's dtype, the engine in a process of its own."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from decimated_models import CASES, CheckedDeciMamba, TooCloseError
from references.torch_models import Plain, ReadingMethod, TorchModel
from tiny_models import random_token_ids

from .harness import ask_default_engines, selected_parameters

pytestmark = pytest.mark.engine

SETTINGS: dict[str, Any] = {"layers": [1], "L_base": 60}
# Two are not decimated. Of the others, each family passes over those in which bfloat16 could turn the choice over.
LENGTHS_AND_SEEDS = ((5, 0), (61, 0), (62, 0), (62, 2), (62, 12), (62, 19), (90, 1), (90, 12), (90, 17), (90, 34))
PROMPTS = [random_token_ids(length, seed=seed) for length, seed in LENGTHS_AND_SEEDS]
LEAST_GAP = 0.03


@pytest.fixture(scope="module")
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("defaults")
    return {name: CASES[name].write(folder / name) for name in selected_parameters(request, "name")}


@pytest.fixture(scope="module")
def answers(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Name of a case -> for each prompt [token, log-probability] of the likeliest next tokens."""
    arguments = {"model_impl": "decimamba", "additional_config": {"decimamba": SETTINGS}}
    return ask_default_engines(models, PROMPTS, arguments, tmp_path_factory.mktemp("answers"))


# Both mixers in every run of the tests; the third family in the slow ones.
NAMES = [pytest.param(name, marks=pytest.mark.slow) if name == "falcon_mamba" else name for name in CASES]


@pytest.mark.parametrize("name", NAMES)
def test_nothing_but_the_settings_given(name: str, models: dict[str, Path], answers: dict[str, Any]) -> None:
    assert isinstance(answers[name], list), answers[name]
    compared = 0
    for prompt, answer in zip(PROMPTS, answers[name], strict=True):
        tokens = [int(token) for token, _ in answer]
        actual = np.array([logprob for _, logprob in answer])

        def distance(method: ReadingMethod, prompt: list[int], tokens: list[int], actual: np.ndarray) -> float:
            logits = TorchModel(models[name], method, device="cpu").read([prompt]).logits[0, -1]
            return float(np.abs(logits.log_softmax(-1).numpy()[tokens] - actual).mean())

        plain = distance(Plain(), prompt, tokens, actual)
        if len(prompt) <= SETTINGS["L_base"] + 1:
            assert plain < 0.3
            continue
        try:
            decimated = distance(CheckedDeciMamba(**SETTINGS, least_gap=LEAST_GAP), prompt, tokens, actual)
        except TooCloseError:
            continue
        compared += 1
        # bfloat16 moves log-probabilities by some 0.1; a dropped token by whole units, if it is not one of little dt.
        assert decimated < 0.3
        if len(prompt) > 62:
            assert decimated < 0.5 * plain
    assert compared >= 2
