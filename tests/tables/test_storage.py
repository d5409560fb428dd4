"""Saving and loading: round trips, identical bytes, whole files or none."""

import errno
import os
import re
import resource
import secrets
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.numpy import load_file

from vllm_longmamba.tables import (
    TableError,
    ThresholdTable,
    load_table,
    read_metadata,
    save_table,
    table_from_bytes,
    table_to_bytes,
)

MakeTable = Callable[..., ThresholdTable]
ROOT = Path(__file__).resolve().parents[2]


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


def test_save_table_readable_by_others(make_table: MakeTable, tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        save_table(make_table(), tmp_path / "table")
    finally:
        os.umask(before)
    assert (tmp_path / "table").stat().st_mode & 0o777 == 0o644


_SAVE_TWICE = """
import sys
import numpy as np, torch
from vllm_longmamba.tables import LayerThresholds, TableMetadata, ThresholdTable, save_table

rows = torch.linspace(0, 1, 28).reshape(4, 7)
rows[0] = -1.0
layer = LayerThresholds(retention=torch.linspace(0, 1, 7, dtype=torch.float64), dt_threshold=rows)
metadata = TableMetadata(
    model_id="m", weights_fingerprint="f", train_length=8, corpus="c", clamp_percent=5, min_retention=1e-2,
    num_sequences=5, seed=0, tool_version="0",
)
table = ThresholdTable(metadata=metadata, row_lengths=np.array([8, 9, 12, 30]), layers={2: layer, 0: layer, 1: layer})
save_table(table, sys.argv[1])
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
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


@pytest.mark.parametrize("link", [False, True], ids=["file", "link"])
def test_save_table_follows_nothing_that_lies_at_its_temporary_name(
    make_table: MakeTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, link: bool
) -> None:
    """Whoever could guess the random name still could not have another file overwritten."""
    precious = tmp_path / "precious"
    precious.write_text("mine")
    monkeypatch.setattr(secrets, "token_hex", lambda count: "0" * 2 * count)
    planted = tmp_path / f".table.{'0' * 16}.tmp"
    if link:
        planted.symlink_to(precious)
    else:
        precious.rename(planted)
        precious = planted
    with pytest.raises(FileExistsError):
        save_table(make_table(), tmp_path / "table")
    assert precious.read_text() == "mine"
    assert not (tmp_path / "table").exists()


def test_save_table_has_temporary_names_that_nobody_can_guess(
    make_table: MakeTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = []
    monkeypatch.setattr(os, "replace", lambda source, target: names.append(source.name))
    for _ in range(2):
        save_table(make_table(), tmp_path / "table")
    assert all(re.fullmatch(r"\.table\.[0-9a-f]{16}\.tmp", name) for name in names)
    assert len(set(names)) == 2


def test_save_table_deletes_what_killed_writers_left(make_table: MakeTable, tmp_path: Path) -> None:
    two_days = 2 * 24 * 3600
    left_over, elsewhere = tmp_path / f".table.{'a' * 16}.tmp", tmp_path / "elsewhere"
    others = [tmp_path / f".{name}.tmp" for name in (f"table.{'b' * 16}", f"other.{'a' * 16}", "table.mine", "table")]
    for path in (left_over, *others, elsewhere):
        path.write_text("half a table")
        age = 0 if "b" * 16 in path.name else two_days
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - age))
    save_table(make_table(), tmp_path / "table")
    assert sorted(tmp_path.iterdir()) == sorted([*others, elsewhere, tmp_path / "table"])


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


@pytest.mark.parametrize("damage", ["short", "other", "tensors"])
def test_table_from_bytes_refuses(damage: str, make_table: MakeTable) -> None:
    content = table_to_bytes(make_table())
    damaged = {"short": content[:50], "other": b"hello, world", "tensors": content[:-8]}[damage]
    with pytest.raises(TableError, match=r"threshold table in memory: this is no safetensors file"):
        table_from_bytes(damaged)


@pytest.mark.parametrize(
    ("path", "digest"),
    [
        ("tables/shipped/passkey-mamba2-4m.safetensors", "8524b8152244f8b113e2f04ada2d9d30"),
        ("examples/reference-mamba1-4m/longmamba.safetensors", "6cf87403d4089e67d680a46ceed2de2a"),
        ("examples/reference-mamba2-few-writes-4m/longmamba.safetensors", "437b0afcce43bcecf71cdfdddb46ae4b"),
        ("examples/reference-zamba2-1m/longmamba.safetensors", "1bef74027e396da81ade6359ffce9c41"),
    ],
)
def test_the_tables_of_this_repository_stay_the_same(path: str, digest: str) -> None:
    """A new format may write their files anew, with the thresholds that the results were measured with."""
    assert load_table(ROOT / path).digest() == digest
