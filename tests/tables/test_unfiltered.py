"""Channels that are left unfiltered: what a table then does, and that it is kept."""

from pathlib import Path

import pytest
import torch
from small_tables import small_table

from vllm_longmamba.tables import filtered_channels, leave_unfiltered, load_table, save_table


def test_channels_and_layers() -> None:
    table = small_table(layers=(0, 1, 2))
    left = leave_unfiltered(table, ["2", "0.1"])
    assert filtered_channels(table, 1e-9) == {0: [0, 1, 2], 1: [0, 1, 2], 2: [0, 1, 2]}
    assert filtered_channels(left, 1e-9) == {0: [0, 2], 1: [0, 1, 2]}
    assert filtered_channels(left) == {0: [2], 1: [2]}  # theta 1e-2; retentions 1e-6, 1e-3 and 1
    assert torch.equal(left.thresholds(1), table.thresholds(1))
    assert bool((left.thresholds(2) == -1).all())
    assert left.metadata.unfiltered == ("0.1", "2")
    assert torch.equal(left.layers[2].retention, table.layers[2].retention)
    assert left.digest() != table.digest()


def test_what_is_left_out_adds_up_and_is_saved(tmp_path: Path) -> None:
    left = leave_unfiltered(leave_unfiltered(small_table(), ["1.2"]), ["0.2"])
    save_table(left, tmp_path / "table.safetensors")
    loaded = load_table(tmp_path / "table.safetensors")
    assert loaded.metadata.unfiltered == ("0.2", "1.2")
    assert filtered_channels(loaded) == {}
    assert loaded.digest() == left.digest()


@pytest.mark.parametrize("name", ["3", "0.3", "0.-1", "0.1.2", "x", ""])
def test_wrong_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="unfiltered: "):
        leave_unfiltered(small_table(), [name])
