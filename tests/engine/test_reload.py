"""Weights that are loaded into a running engine: the thresholds stay, and other weights are refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import random_token_ids, write_mamba2_original

from .conftest import A_HYBRID, longmamba
from .harness import Engine, assert_exact

pytestmark = pytest.mark.engine

PROMPTS = [random_token_ids(length, seed=length) for length in (64, 200)]


def spoil_weights(worker: Any) -> None:
    """What is in the weights after a sleep of level 2: anything."""
    for parameter in worker.get_model().parameters():
        parameter.data.fill_(-0.5)


def assert_filters(running: Engine, model: Path, table: Any) -> None:
    for prompt, result in zip(PROMPTS, running.generate(PROMPTS), strict=True):
        assert_exact(model, prompt, result, table)


@pytest.mark.parametrize("family", ["mamba1", "mamba2", "zamba2", A_HYBRID])
def test_reload(
    family: str, engine: Callable[..., Any], tiny_model: Callable[[str], Path], tiny_table: Callable[[str], Any]
) -> None:
    path, table = tiny_table(family)
    running = engine(family, **longmamba(path))
    running.llm.collective_rpc(spoil_weights)
    with pytest.raises(AssertionError):
        assert_filters(running, tiny_model(family), table)
    running.llm.collective_rpc("reload_weights")
    assert_filters(running, tiny_model(family), table)


def test_other_weights(
    engine: Callable[..., Any], tiny_model: Callable[[str], Path], tiny_table: Callable[[str], Any], tmp_path: Path
) -> None:
    path, table = tiny_table("mamba2")
    running = engine("mamba2", **longmamba(path))
    other = write_mamba2_original(tmp_path / "other", seed=1)
    message = f"thresholds were made for weights {table.metadata.weights_fingerprint[:12]}, but the weights to be"
    with pytest.raises(ValueError, match=message):
        running.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(other)})
    weights = torch.load(other / "pytorch_model.bin", weights_only=True)
    with pytest.raises(ValueError, match="weights can be reloaded from a checkpoint only"):
        running.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights.items())})
    # Nothing was changed.
    assert_filters(running, tiny_model("mamba2"), table)


def test_other_weights_without_the_filter(
    engine: Callable[..., Any], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    running = engine("mamba2", **longmamba())
    other = write_mamba2_original(tmp_path / "other", seed=1)
    running.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(other)})
    assert_filters(running, other, None)
    # The engine is shared with other tests.
    running.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(tiny_model("mamba2"))})
    assert_filters(running, tiny_model("mamba2"), None)
