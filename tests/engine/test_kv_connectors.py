"""States that a KV connector keeps outside the engine's cache are reused where they are the same, and only there."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import random_token_ids

from .conftest import longmamba
from .harness import assert_exact, write_table

pytestmark = [pytest.mark.gpu, pytest.mark.engine]

FAMILIES = ["mamba1", "mamba2", "zamba2", "granite_hybrid"]
STORED_SECONDS = 60


@pytest.mark.parametrize("family", FAMILIES)
def test_offloaded_states(
    family: str, engine: Callable[..., Any], tiny_model: Callable[[str], Any], tiny_table: Callable[[str], Any]
) -> None:
    path, table = tiny_table(family)
    running = engine(
        family,
        **longmamba(path),
        enable_prefix_caching=True,
        max_num_batched_tokens=512,
        kv_offloading_size=0.25,
        kv_offloading_backend="native",
    )
    model = tiny_model(family)
    # The last row of the table serves all lengths from 600 on.
    first = random_token_ids(900, seed=1)
    assert_exact(model, first, running.generate([first])[0], table)

    same_row, other_row = first + random_token_ids(12, seed=2), first[:590]
    assert table.row_of(len(same_row)) == table.row_of(len(first)) != table.row_of(len(other_row))
    for prompt, is_shared in [(same_row, True), (other_row, False)]:
        # What is still on the GPU is forgotten; main memory is not.
        assert running.llm.reset_prefix_cache()
        result = running.generate([prompt])[0]
        assert (result.cached_tokens > 0) == is_shared
        assert_exact(model, prompt, result, table)


def wait_for_files(running: Any, folder: Path) -> None:
    """Until an engine has written states, and writes no more."""
    before, deadline = 0, time.monotonic() + STORED_SECONDS
    while (count := len(list(folder.rglob("*.bin")))) == 0 or count != before:
        assert time.monotonic() < deadline, f"{count} files were written"
        before = count
        # It starts to write between steps.
        running.generate([random_token_ids(8)], max_tokens=1)
        time.sleep(1)


@pytest.mark.parametrize("family", FAMILIES)
def test_states_of_another_engine(
    family: str,
    engine: Callable[..., Any],
    tiny_model: Callable[[str], Path],
    tiny_table: Callable[[str], Any],
    tmp_path: Path,
) -> None:
    """One engine reads a prompt, the next takes its states from files; one with another table does not."""
    model, (path, table), states = tiny_model(family), tiny_table(family), tmp_path / "states"
    other_path = tmp_path / "other.safetensors"
    other_table = write_table(model, other_path, seed=1)
    tiers = {"spec_name": "TieringOffloadingSpec", "cpu_bytes_to_use": 2**28}
    tiers["secondary_tiers"] = [{"type": "fs", "root_dir": str(states)}]
    connector = {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": tiers}
    options = {"enable_prefix_caching": True, "max_num_batched_tokens": 512, "kv_transfer_config": connector}

    prompt = random_token_ids(900, seed=1)
    first = engine(family, **longmamba(path), **options)
    first.generate([prompt])
    wait_for_files(first, states)
    longer = prompt + random_token_ids(12, seed=2)
    # Another number of requests makes it another engine.
    for table_path, its_table, is_shared in ((path, table, True), (other_path, other_table, False)):
        (result,) = engine(family, **longmamba(table_path), **options, max_num_seqs=8).generate([longer])
        assert (result.cached_tokens > 0) == is_shared
        assert_exact(model, longer, result, its_table)
