"""Saving and loading: round trips, identical bytes, whole files or none."""

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from vllm_longmamba.tables import (
    LayerCalibration,
    LayerThresholds,
    TableError,
    ThresholdTable,
    default_row_lengths,
    load_table,
    read_metadata,
    save_table,
    storage,
    table_from_bytes,
    table_to_bytes,
)

MakeTable = Callable[..., ThresholdTable]
LIMIT = 2**25


def _assert_same(loaded: ThresholdTable, table: ThresholdTable) -> None:
    assert loaded.metadata == table.metadata
    assert loaded.row_lengths.tolist() == table.row_lengths.tolist()
    assert list(loaded.layers) == sorted(table.layers)
    for layer, thresholds in table.layers.items():
        assert torch.equal(loaded.layers[layer].retention, thresholds.retention)
        assert torch.equal(loaded.layers[layer].dt_threshold, thresholds.dt_threshold)


def test_save_table(make_table: MakeTable, tmp_path: Path) -> None:
    table = make_table(layers=(11, 2, 0))
    path = tmp_path / "longmamba.safetensors"
    save_table(table, path)
    loaded = load_table(path)
    _assert_same(loaded, table)
    assert loaded.digest() == table.digest()
    parts = {f"longmamba.layers.{layer}.{part}" for layer in (0, 2, 11) for part in ("retention", "dt_threshold")}
    assert set(load_file(path)) == parts | {"longmamba.row_lengths"}


def test_save_table_tells_how_sequences_were_combined(make_table: MakeTable, tmp_path: Path) -> None:
    """Except for the plain mean: such a file is one of those that know no other."""
    for combine in ("clipped", "mean"):
        table = make_table(method="unclamped", clamp_percent=0, combine=combine)
        save_table(table, tmp_path / combine)
        _assert_same(load_table(tmp_path / combine), table)
        assert (b"combine" in (tmp_path / combine).read_bytes()) is (combine == "clipped")


def test_save_table_readable_by_others(make_table: MakeTable, tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        save_table(make_table(), tmp_path / "table")
    finally:
        os.umask(before)
    assert (tmp_path / "table").stat().st_mode & 0o777 == 0o644


def test_save_table_of_mamba_1_4b_stays_within_32_mb(make_metadata: MakeTable, tmp_path: Path) -> None:
    """48 layers x 4096 channels, a row every 1000 tokens up to 192,000.

    512 channels are calibrated; each layer holds them eight times, in another order and with factors of its own.
    """
    train_length, channels = 2048, 512
    row_lengths = default_row_lengths(train_length, 192_000)
    assert len(row_lengths) == 191
    generator = torch.Generator().manual_seed(0)
    spread = 0.1 + 2.5 * torch.rand(channels, generator=generator)
    center = 2 * torch.randn(channels, generator=generator) - 5
    calibration = LayerCalibration(torch.full((channels, 16), -0.1), train_length, row_lengths, clamp_percent=5.0)
    for _ in range(2):
        dt = torch.exp(torch.randn(train_length, channels, generator=generator) * spread + center)
        calibration.add(dt)
    calibrated = calibration.result()
    layers = {}
    for layer in range(48):
        order = torch.cat([torch.randperm(channels, generator=generator) for _ in range(8)])
        factors = torch.exp(torch.randn(8 * channels, generator=generator))
        dt_threshold = calibrated.dt_threshold[:, order] * factors
        dt_threshold[0] = -1.0
        retention = torch.rand(8 * channels, generator=generator, dtype=torch.float64)
        layers[layer] = LayerThresholds(retention=retention, dt_threshold=dt_threshold)
    table = ThresholdTable(metadata=make_metadata(train_length=train_length), row_lengths=row_lengths, layers=layers)
    path = tmp_path / "table.safetensors"
    save_table(table, path)
    assert path.stat().st_size <= LIMIT
    loaded = load_table(path)
    for layer in (0, 47):
        assert torch.equal(loaded.layers[layer].retention, layers[layer].retention)
        np.testing.assert_allclose(
            loaded.layers[layer].dt_threshold.numpy(), layers[layer].dt_threshold.numpy(), rtol=5.005e-4
        )


_SAVE_TWICE = """
import sys
import numpy as np, torch
from vllm_longmamba.tables import LayerThresholds, TableMetadata, ThresholdTable, save_table, storage

rows = torch.linspace(0, 1, 28).reshape(4, 7)
rows[0] = -1.0
layer = LayerThresholds(retention=torch.linspace(0, 1, 7, dtype=torch.float64), dt_threshold=rows)
metadata = TableMetadata(
    model_id="m", weights_fingerprint="f", train_length=8, corpus="c", clamp_percent=5, min_retention=1e-2,
    num_sequences=5, seed=0, tool_version="0",
)
table = ThresholdTable(metadata=metadata, row_lengths=np.array([8, 9, 12, 30]), layers={2: layer, 0: layer, 1: layer})
save_table(table, sys.argv[1] + ".raw")
storage.RAW_LIMIT = 0
save_table(table, sys.argv[1] + ".packed")
print(table.digest())
"""


def test_save_table_writes_the_same_bytes(tmp_path: Path) -> None:
    processes = []
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-c", _SAVE_TWICE, str(tmp_path / seed)]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    digests = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert digests[0] == digests[1]
    for form in ("raw", "packed"):
        assert (tmp_path / f"1.{form}").read_bytes() == (tmp_path / f"2.{form}").read_bytes()
    assert "longmamba.layers.0.dt_threshold" in load_file(tmp_path / "1.raw")
    assert "longmamba.layers.0.dt_threshold.packed" in load_file(tmp_path / "1.packed")


def test_save_table_packs_only_past_the_limit(
    make_table: MakeTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, path = make_table(), tmp_path / "table"
    save_table(table, path)
    size = path.stat().st_size
    for limit, packed in ((size, False), (size - 1, True)):
        monkeypatch.setattr(storage, "RAW_LIMIT", limit)
        save_table(table, path)
        assert ("longmamba.layers.0.dt_threshold.packed" in load_file(path)) is packed
    content = path.read_bytes()
    loaded = load_table(path)
    for layer, thresholds in table.layers.items():
        np.testing.assert_allclose(loaded.layers[layer].dt_threshold, thresholds.dt_threshold, rtol=5.005e-4)
    save_table(loaded, path)
    assert path.read_bytes() == content, "packing what was packed must change nothing"


def _fail(*_: Any, **__: Any) -> None:
    raise OSError(errno.EIO, "the disk is gone")


@pytest.mark.parametrize("existing", [False, True], ids=["new file", "file exists"])
@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_save_table_whole_or_not_at_all(
    make_table: MakeTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, existing: bool
) -> None:
    path = tmp_path / "table"
    if existing:
        save_table(make_table(seed=1), path)
    monkeypatch.setattr(os, function, _fail)
    with pytest.raises(OSError, match="the disk is gone"):
        save_table(make_table(seed=2), path)
    assert list(tmp_path.iterdir()) == [path] * existing
    assert not existing or read_metadata(path).seed == 1


def test_save_table_to_a_full_disk(make_table: MakeTable, tmp_path: Path) -> None:
    path = tmp_path / "table"
    save_table(make_table(seed=1), path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The kernel itself then refuses to write past 20,000 bytes.
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_table(make_table(seed=2, channels=2000), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == [path]
    assert load_table(path).metadata.seed == 1


def test_read_metadata(make_table: MakeTable, tmp_path: Path) -> None:
    table = make_table(model_id="another/model", clamp_percent=20)
    save_table(table, tmp_path / "table")
    assert read_metadata(str(tmp_path / "table")) == table.metadata


def test_table_to_bytes_is_what_the_file_holds(make_table: MakeTable, tmp_path: Path) -> None:
    table = make_table(layers=(1, 0))
    save_table(table, tmp_path / "table")
    content = table_to_bytes(table)
    assert content == (tmp_path / "table").read_bytes()
    _assert_same(table_from_bytes(content), table)


def test_table_from_bytes_of_packed_thresholds(make_table: MakeTable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "RAW_LIMIT", 10)
    table = make_table()
    read = table_from_bytes(table_to_bytes(table))
    for layer, thresholds in table.layers.items():
        assert not torch.equal(read.layers[layer].dt_threshold, thresholds.dt_threshold)
        np.testing.assert_allclose(read.layers[layer].dt_threshold, thresholds.dt_threshold, rtol=1e-3)
    # What has been stored once no longer changes.
    assert table_from_bytes(table_to_bytes(read)).digest() == read.digest()


@pytest.mark.parametrize("damage", ["short", "other", "tensors"])
def test_table_from_bytes_refuses(damage: str, make_table: MakeTable) -> None:
    content = table_to_bytes(make_table())
    damaged = {"short": content[:50], "other": b"hello, world", "tensors": content[:-8]}[damage]
    with pytest.raises(TableError, match=r"threshold table in memory: this is no safetensors file"):
        table_from_bytes(damaged)
