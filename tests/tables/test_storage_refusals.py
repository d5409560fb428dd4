"""Files that are no table, damaged, or of another format: refused with the path and what to do."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from vllm_longmamba.tables import TableError, TableMetadata, ThresholdTable, load_table, read_metadata, save_table

MakeTable = Callable[..., ThresholdTable]


def _resave(
    path: Path, change: Callable[[dict[str, np.ndarray], dict[str, Any]], None], metadata: TableMetadata
) -> None:
    tensors = load_file(path)
    fields = dict(vars(metadata))
    change(tensors, fields)
    save_file(tensors, path, {"longmamba": json.dumps(fields)})


def _set(**fields: Any) -> Callable[[dict[str, np.ndarray], dict[str, Any]], None]:
    return lambda tensors, metadata: metadata.update(fields)


def _replace(name: str, array: np.ndarray) -> Callable[[dict[str, np.ndarray], dict[str, Any]], None]:
    return lambda tensors, metadata: tensors.update({name: array})


def _drop(name: str) -> Callable[[dict[str, np.ndarray], dict[str, Any]], None]:
    return lambda tensors, metadata: tensors.pop(name) if name in tensors else metadata.pop(name)


_RETENTION = "longmamba.layers.0.retention"
_THRESHOLD = "longmamba.layers.0.dt_threshold"
_NAN_ROWS = np.full((4, 5), np.nan, dtype=np.float32)


@pytest.mark.parametrize(
    ("change", "message", "in_metadata"),
    [
        pytest.param(_set(format_version=2), "written by format version 2, this release reads 1", True, id="version"),
        pytest.param(_drop("format_version"), "written by format version None", True, id="no version"),
        pytest.param(_drop("seed"), r"metadata missing: \['seed'\], unknown: \[\]", True, id="field missing"),
        pytest.param(_set(extra=1), r"missing: \[\], unknown: \['extra'\]", True, id="field unknown"),
        pytest.param(_set(train_length="8"), "train_length must be int", True, id="field type"),
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
        pytest.param(_replace(f"{_THRESHOLD}.packed", np.zeros(9, "u1")), "thresholds are damaged", False, id="packed"),
    ],
)
def test_load_table_refuses(
    make_table: MakeTable,
    tmp_path: Path,
    change: Callable[[dict[str, np.ndarray], dict[str, Any]], None],
    message: str,
    in_metadata: bool,
) -> None:
    path, table = tmp_path / "table", make_table()
    save_table(table, path)
    _resave(path, change, table.metadata)
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
    ],
)
def test_load_table_refuses_other_metadata(tmp_path: Path, metadata: dict[str, str], message: str) -> None:
    path = tmp_path / "table"
    save_file({"longmamba.row_lengths": np.array([8])}, path, metadata)
    with pytest.raises(TableError, match=message):
        load_table(path)


def test_load_table_refuses_truncated_files(make_table: MakeTable, tmp_path: Path) -> None:
    path = tmp_path / "table"
    save_table(make_table(), path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(TableError, match="no safetensors file, or a truncated one"):
            load_table(path)


def test_load_table_of_damaged_files(make_table: MakeTable, tmp_path: Path) -> None:
    """One wrong byte is refused with a TableError, or it lies in a number that is as good as another."""
    path, table = tmp_path / "table", make_table()
    save_table(table, path)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    refused_in_header = 0
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 0x81
        path.write_bytes(damaged)
        try:
            loaded = load_table(path)
        except TableError:
            refused_in_header += position < header
        else:
            assert loaded.digest() != table.digest() or loaded.metadata != table.metadata
    # 0x81 is no ASCII, so JSON and UTF-8 notice nearly every one.
    assert refused_in_header > 0.9 * header
