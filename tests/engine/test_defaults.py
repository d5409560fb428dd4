"""What users run: compiled, in the model's dtype, the engine in a process of its own, nothing but the model named."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from references.reference_lm import reference_logprobs
from tiny_models import random_token_ids

from .conftest import WRITERS
from .harness import ROW_LENGTHS, TRAIN_LENGTH, ask_default_engines, selected_parameters

pytestmark = pytest.mark.engine

PROMPTS = [random_token_ids(length, seed=length) for length in (TRAIN_LENGTH, 161, 500)]


@pytest.fixture(scope="module")
def answers(
    request: pytest.FixtureRequest,
    tiny_model: Callable[[str], Path],
    tiny_table: Callable[[str], tuple[Path, Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    """Family -> what an engine of all defaults answers, its table beside the weights as a user would put it there."""
    folder = tmp_path_factory.mktemp("defaults")
    models = {family: folder / family for family in selected_parameters(request, "family")}
    for family, model in models.items():
        shutil.copytree(tiny_model(family), model)
        shutil.copyfile(tiny_table(family)[0], model / "longmamba.safetensors")
    return ask_default_engines(models, PROMPTS, {"model_impl": "longmamba"}, folder)


# Each mixer and the paper's hybrid in every run of the tests. The others take half a minute of a core each: they are in
# the slow ones; in every run, test_exactness.py has all families, not compiled.
FAMILIES = [
    family if family in ("mamba1", "mamba2", "zamba2") else pytest.param(family, marks=pytest.mark.slow)
    for family in WRITERS
]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_with_nothing_but_the_model_named(
    family: str,
    answers: dict[str, Any],
    tiny_model: Callable[[str], Path],
    tiny_table: Callable[[str], tuple[Path, Any]],
) -> None:
    assert isinstance(answers[family], list), answers[family]
    table = tiny_table(family)[1]

    def distance(prompt: list[int], answer: list[list[float]], row: int) -> float:
        """Mean difference of the answer's log-probabilities from those of a reference that filters by a row."""
        filters = {layer: table.thresholds(layer)[row].double() for layer in table.layers}
        expected = reference_logprobs(tiny_model(family), prompt, prompt_length=len(prompt), filters=filters)[-1]
        tokens, actual = [int(token) for token, _ in answer], np.array([logprob for _, logprob in answer])
        return float(np.abs(expected.numpy()[tokens] - actual).mean())

    rows = [int(np.argmin(np.abs(np.array(ROW_LENGTHS) - len(prompt)))) for prompt in PROMPTS]
    assert [row > 0 for row in rows] == [False, True, True]
    asked = list(zip(PROMPTS, answers[family], rows, strict=True))
    # bfloat16 moves log-probabilities by up to 0.2 and puts some dt on the other side of their thresholds.
    assert distance(*asked[0]) < 0.3
    assert sum(distance(*one) for one in asked[1:]) < 0.5 * sum(distance(*one[:2], 0) for one in asked[1:])
