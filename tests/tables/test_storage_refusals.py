"""Files that are no table, damaged, or of another format: refused with the path and what to do."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blake3 import blake3
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch_file

from vllm_longmamba.tables import TableError, ThresholdTable, load_table, read_metadata, save_table, table_from_bytes

MakeTable = Callable[..., ThresholdTable]


Change = Callable[[dict[str, np.ndarray], dict[str, Any]], None]


def _checksum(tensors: dict[str, np.ndarray], metadata: dict[str, Any]) -> str:
    """The checksum as tables/storage.py describes it."""
    content = blake3(json.dumps(metadata, sort_keys=True).encode())
    for name, array in sorted(tensors.items()):
        content.update(repr((name, array.dtype.str, array.shape)).encode() + array.tobytes())
    return content.hexdigest()


def _change_file(path: Path, change: Change) -> None:
    """Changes tensors or metadata of a table's file as somebody would who makes the checksum fit again."""
    tensors = load_file(path)
    with safe_open(path, framework="numpy") as file:
        metadata = json.loads(file.metadata()["longmamba"])
    del metadata["checksum"]
    change(tensors, metadata)
    save_file(tensors, path, {"longmamba": json.dumps(metadata | {"checksum": _checksum(tensors, metadata)})})


def _set(**fields: Any) -> Change:
    return lambda tensors, metadata: metadata.update(fields)


def _replace(name: str, array: np.ndarray) -> Change:
    return lambda tensors, metadata: tensors.update({name: array})


def _drop(name: str) -> Change:
    return lambda tensors, metadata: tensors.pop(name) if name in tensors else metadata.pop(name)


_RETENTION = "longmamba.layers.0.retention"
_THRESHOLD = "longmamba.layers.0.dt_threshold"
_NAN_ROWS = np.full((4, 5), np.nan, dtype=np.float32)


@pytest.mark.parametrize(
    ("change", "message", "in_metadata"),
    [
        pytest.param(_set(format_version=1), "written by format version 1, this release reads 3", True, id="version"),
        pytest.param(_drop("format_version"), "written by format version None", True, id="no version"),
        pytest.param(_drop("seed"), r"metadata missing: \['seed'\], unknown: \[\]", True, id="field missing"),
        pytest.param(_set(extra=1), r"missing: \[\], unknown: \['extra'\]", True, id="field unknown"),
        pytest.param(_set(train_length="8"), "train_length must be a number of tokens", True, id="field type"),
        pytest.param(
            _set(clamp_percent=10**400), "clamp_percent must lie in .0, 100., got an integer of", True, id="C"
        ),
        pytest.param(_set(budget=10**400), "budget must be a factor above 0, got an integer", True, id="budget"),
        pytest.param(_set(min_retention=10**400), "min_retention must lie in .0, 1., got an integer", True, id="theta"),
        pytest.param(_set(seed=10**400), "seed must be an integer, .* got an integer of 1329 bits", True, id="seed"),
        pytest.param(_set(num_sequences=10**400), "num_sequences must be an integer, 1 to", True, id="sequences"),
        pytest.param(_set(train_length=10**400), "train_length must be a number of tokens", True, id="L"),
        pytest.param(_set(unfiltered_end=10**400), "unfiltered_end must be a number of tokens", True, id="end"),
        pytest.param(_set(train_length=9), "must begin with train_length 9", False, id="other train_length"),
        pytest.param(_drop("longmamba.row_lengths"), "'longmamba.row_lengths' is missing", False, id="no row_lengths"),
        pytest.param(
            _drop("longmamba.layers.3.dt_threshold"),
            "'longmamba.layers.3.dt_threshold' is missing",
            False,
            id="no thresholds",
        ),
        pytest.param(_drop("longmamba.layers.3.retention"), "lack their layer's retention", False, id="no retention"),
        pytest.param(
            _replace("longmamba.layers.x.foo", np.zeros(2)), "'longmamba.layers.x.foo'", False, id="unknown tensor"
        ),
        pytest.param(
            _replace("longmamba.row_lengths", np.array([8, 12])), "one row for each of the 2", False, id="rows"
        ),
        pytest.param(_replace("longmamba.row_lengths", np.zeros((0,))), "at least one row", False, id="empty rows"),
        pytest.param(_replace(_RETENTION, np.ones(6)), "channels of retention", False, id="channels"),
        pytest.param(_replace(_RETENTION, np.ones(5, "f4")), "torch.float64 tensor", False, id="dtype"),
        pytest.param(_replace(_THRESHOLD, _NAN_ROWS), "got NaN", False, id="NaN"),
        pytest.param(
            _replace("longmamba.row_lengths", np.array([8, 12, 16, 2**63 - 1])),
            "at most 1073741824 tokens, got 8 to 9223372036854775807",
            False,
            id="overflowing rows",
        ),
        pytest.param(
            _replace("longmamba.row_lengths", np.array([8, 12, 16, 2**64 - 1], "u8")),
            "at most 1073741824 tokens, got 8 to 18446744073709551615",
            False,
            id="unsigned rows",
        ),
    ],
)
def test_load_table_refuses(
    make_table: MakeTable,
    tmp_path: Path,
    change: Change,
    message: str,
    in_metadata: bool,
) -> None:
    path = tmp_path / "table"
    save_table(make_table(), path)
    _change_file(path, change)
    with pytest.raises(TableError, match=message) as refusal:
        load_table(path)
    assert str(path) in str(refusal.value)
    assert "`longmamba calibrate" in str(refusal.value)
    if in_metadata:
        with pytest.raises(TableError, match=message):
            read_metadata(path)
    else:
        assert read_metadata(path).model_id == "org/model"


@pytest.mark.parametrize("read", [load_table, read_metadata])
@pytest.mark.parametrize(
    "removed",
    [
        {
            "method": "closed-loop",
            "closed_loop": {"combine": "median", "lengths": [12], "text_tokens": 9, "budget": 1.0},
        },
        {"method": "unclamped", "clamp_percent": 0.0, "channel_budgets": ["0.1=2"]},
        {"method": "unclamped", "clamp_percent": 0.0, "combine": "median"},
        {"unfiltered": ["0.1"]},
    ],
    ids=["closed loop", "channel budgets", "combine", "unfiltered channels"],
)
def test_tables_of_removed_options_are_refused(
    removed: dict[str, Any], read: Callable[[Path], object], make_table: MakeTable, tmp_path: Path
) -> None:
    path = tmp_path / "table"
    save_table(make_table(), path)
    usual = {"combine": "mean", "closed_loop": None, "unfiltered": [], "channel_budgets": []}
    _change_file(path, _set(format_version=2, **usual | removed))
    with pytest.raises(TableError, match=r"version 2, this release reads 3; .* with `longmamba calibrate org/model`"):
        read(path)


@pytest.mark.parametrize("read", [load_table, read_metadata])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"", "no safetensors file, or a truncated one", id="empty"),
        pytest.param(b"not a table at all\n", "no safetensors file, or a truncated one", id="text"),
        pytest.param(None, "there is no such file", id="no file"),
    ],
)
def test_load_table_refuses_other_files(
    tmp_path: Path, read: Callable[[Path], object], content: bytes | None, message: str
) -> None:
    path = tmp_path / "table"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TableError, match=message) as refusal:
        read(path)
    assert str(path) in str(refusal.value)
    assert "`longmamba calibrate MODEL`" in str(refusal.value)


@pytest.mark.parametrize("read", [load_table, read_metadata])
def test_load_table_refuses_a_folder(tmp_path: Path, read: Callable[[Path], object]) -> None:
    with pytest.raises(TableError, match="cannot be read"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        pytest.param({}, "is no threshold table", id="none"),
        pytest.param({"format": "pt"}, "is no threshold table", id="weights"),
        pytest.param({"longmamba": "{"}, "the metadata is no JSON", id="no JSON"),
        pytest.param({"longmamba": "[1]"}, "format version None", id="no mapping"),
        pytest.param({"longmamba": "[" * 100_000}, "the metadata is no JSON", id="nested"),
        pytest.param({"longmamba": '{"a":' * 100_000}, "the metadata is no JSON", id="nested mappings"),
        pytest.param({"longmamba": "9" * 5000}, "the metadata is no JSON", id="digits"),
    ],
)
def test_load_table_refuses_other_metadata(tmp_path: Path, metadata: dict[str, str], message: str) -> None:
    path = tmp_path / "table"
    save_file({"longmamba.row_lengths": np.array([8])}, path, metadata)
    for read in (load_table, read_metadata, lambda path: table_from_bytes(path.read_bytes())):
        with pytest.raises(TableError, match=message):
            read(path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_load_table_refuses_numbers_that_numpy_has_not(
    dtype: torch.dtype, make_table: MakeTable, tmp_path: Path
) -> None:
    path = tmp_path / "table"
    save_table(make_table(), path)
    with safe_open(path, framework="numpy") as file:
        header = file.metadata()
    save_torch_file({"longmamba.row_lengths": torch.zeros(3, dtype=dtype)}, path, header)
    for read in (load_table, lambda path: table_from_bytes(path.read_bytes())):
        with pytest.raises(TableError, match="no safetensors file, or a truncated one"):
            read(path)


def test_load_table_refuses_truncated_files(make_table: MakeTable, tmp_path: Path) -> None:
    path = tmp_path / "table"
    save_table(make_table(), path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(TableError, match="no safetensors file, or a truncated one"):
            load_table(path)


def test_load_table_refuses_damaged_files(make_table: MakeTable, tmp_path: Path) -> None:
    """One wrong bit anywhere is noticed, unless the JSON still says the same."""
    path, table = tmp_path / "table", make_table()
    save_table(table, path)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    accepted = 0
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        try:
            loaded = table_from_bytes(bytes(damaged))
        except TableError:
            continue
        accepted += 1
        assert position < header
        assert (loaded.digest(), loaded.metadata) == (table.digest(), table.metadata)
    assert accepted < 10
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 64]))
    with pytest.raises(
        TableError, match="table: the file is damaged, its contents do not have its checksum; make a new"
    ):
        load_table(path)
