"""`--hf-overrides` scales the rotary embedding of a hybrid's attention, while its Mamba layers filter."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import random_token_ids

from .conftest import longmamba
from .harness import assert_exact

pytestmark = pytest.mark.engine

POSITIONS = 256
SCALINGS = {
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": POSITIONS, "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    # NTK-aware scaling is a larger base.
    "ntk": {"rope_type": "default", "rope_theta": 80000.0},
}


def copy_with(model: Path, folder: Path, **changes: Any) -> Path:
    """The same weights with another config."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


# vLLM computes each; one in every run shows that the override reaches it.
@pytest.mark.parametrize(
    ("family", "scaling"),
    [
        ("zamba2", "yarn"),
        *(pytest.param("zamba2", scaling, marks=pytest.mark.slow) for scaling in ("linear", "ntk")),
        pytest.param("falcon_h1", "yarn", marks=pytest.mark.slow),
    ],
)
def test_beyond_the_length_of_the_attention(
    family: str,
    scaling: str,
    engine: Callable[..., Any],
    tiny_model: Callable[[str], Path],
    tiny_table: Callable[[str], Any],
    tmp_path: Path,
) -> None:
    path, table = tiny_table(family)
    plain = copy_with(tiny_model(family), tmp_path / "plain", max_position_embeddings=POSITIONS)
    rope = SCALINGS[scaling]
    scaled = copy_with(plain, tmp_path / "scaled", rope_parameters=rope)
    running = engine(plain, **longmamba(path), hf_overrides={"rope_parameters": rope}, max_model_len=4 * POSITIONS)
    prompts = [random_token_ids(length, seed=length) for length in (64, 300, 900)]
    for prompt, result in zip(prompts, running.generate(prompts), strict=True):
        assert_exact(scaled, prompt, result, table)
        with pytest.raises(AssertionError):
            assert_exact(plain, prompt, result, table)
