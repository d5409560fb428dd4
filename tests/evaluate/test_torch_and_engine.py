"""The engine and the torch reference agree in float32: plain and LongMamba, log-probabilities of 20 random prompts."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine.harness import LOGPROB_TOLERANCE, Filters, assert_agrees, write_table
from example_modules import EXAMPLES
from tiny_models import random_token_ids, write_mamba1_original
from torch_models import LongMamba, TorchModel

from vllm_longmamba.evaluate.engine import FILTER_EXTENSION, EngineContestant, EngineRunner
from vllm_longmamba.tables import load_table

pytestmark = pytest.mark.engine

EXAMPLE_TABLE = EXAMPLES.parent / "tables" / "shipped" / "passkey-mamba2-4m.safetensors"
LENGTHS = np.geomspace(40, 2500, 20).round().astype(int).tolist()
PROMPTS = [random_token_ids(length, seed=length) for length in LENGTHS]
SCORED = 30
ENGINE_ARGS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": LENGTHS[-1] + 1,
    "max_num_batched_tokens": 512,
    "gpu_memory_utilization": 0.1,
}
if torch.cuda.is_available():
    ENGINE_ARGS["kv_cache_memory_bytes"] = 2**30


@dataclass(frozen=True)
class Sides:
    """One model on both sides."""

    engine: EngineRunner
    reference: TorchModel
    table: Path


@pytest.fixture(scope="module", params=["example", "mamba1"])
def sides(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sides]:
    """An engine that can change its filter, and the reference."""
    folder, table = EXAMPLES / "passkey-mamba2-4m", EXAMPLE_TABLE
    if request.param == "mamba1":
        folder = write_mamba1_original(tmp_path_factory.mktemp("models") / "mamba1")
        table = tmp_path_factory.mktemp("tables") / "table.safetensors"
        write_table(folder, table)
    options = {"model": str(folder), "additional_config": {"longmamba": {"table": str(table)}}}
    contestant = EngineContestant({**ENGINE_ARGS, **options, "worker_extension_cls": FILTER_EXTENSION})
    with contestant.start() as runner:
        yield Sides(runner, TorchModel(folder), table)


# No channel keeps more than all of its state: 1 filters nothing.
@pytest.mark.parametrize("min_retention", [1.0, 1e-2], ids=["plain", "longmamba"])
def test_logprobs_agree(min_retention: float, sides: Sides) -> None:
    sides.engine.set_filter(sides.table, min_retention)
    of_engine = dict(sides.engine.tail_logprobs(enumerate(PROMPTS), SCORED))
    plain, table = sides.reference, load_table(sides.table)
    filtered = plain.with_method(LongMamba.from_table(table, 1e-2))
    filters = {} if min_retention == 1.0 else {layer: table.thresholds(layer, min_retention) for layer in table.layers}
    for number, prompt in enumerate(PROMPTS):

        def expected(filters: Filters, prompt: list[int] = prompt) -> np.ndarray:
            model = plain.with_method(LongMamba(filters, table.row_of)) if filters else plain
            return model.last_logprobs(prompt, SCORED).double().numpy()

        assert_agrees(of_engine[number], expected, filters)
    # The filter matters to the longer prompts, so that the two cases are two.
    longest = PROMPTS[-1]
    difference = filtered.last_logprobs(longest, SCORED) - plain.last_logprobs(longest, SCORED)
    assert float(difference.abs().max()) > 10 * LOGPROB_TOLERANCE
