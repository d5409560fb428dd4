"""Tables as safetensors files: the same table always gives the same bytes, and a file is whole or absent.

One metadata key, "longmamba", holds all metadata as sorted JSON (safetensors keeps no order between keys). Tensors, all
with the prefix "longmamba." that no model's weights have: "row_lengths" (rows,) int64; for each layer N
"layers.N.retention" (channels,) float64 and "layers.N.dt_threshold" (rows, channels) float32 or, where the file would
pass 32 MB, "layers.N.dt_threshold.packed" (bytes,) uint8.
"""

import json
import os
import re
import secrets
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load, save

from .metadata import FORMAT_VERSION, OPTIONAL, TableMetadata
from .packing import pack_thresholds, unpack_thresholds
from .table import LayerThresholds, ThresholdTable

RAW_LIMIT = 2**25
_METADATA_KEY = "longmamba"
_RETENTION_KEY = re.compile(r"longmamba\.layers\.(0|[1-9][0-9]*)\.retention")


class TableError(ValueError):
    """A file that cannot be used as a threshold table; the message names the file and what to do."""


def save_table(table: ThresholdTable, path: str | os.PathLike[str]) -> None:
    """Writes a table; an existing file is replaced only once the new one is complete on disk.

    Thresholds are stored as they are where the file stays within 32 MB, otherwise to 5e-4 relative (1e-30 at least).

    Args:
        table: the table.
        path: file to write; its folder must exist.

    Raises:
        OSError: the file cannot be written; nothing is left behind.
    """
    save_bytes(table_to_bytes(table), path)


def save_bytes(content: bytes, path: str | os.PathLike[str]) -> None:
    """Writes what `table_to_bytes` returned, as `save_table` does."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    try:
        # Not tempfile: it would hide the table from other users (mode 0600).
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise
    _sync_folder(target.parent)


def load_table(path: str | os.PathLike[str]) -> ThresholdTable:
    """Reads a table.

    Raises:
        TableError: no file, no table, a damaged one, or one of another format version.
    """
    target = Path(path)
    return _assemble(str(target), *_read(target, with_tensors=True))


def table_from_bytes(content: bytes, place: str = "in memory") -> ThresholdTable:
    """Reads a table from what `table_to_bytes` returned: the same that `load_table` reads from a file.

    Args:
        content: the bytes.
        place: where they come from, for messages.

    Raises:
        TableError: no table, a damaged one, or one of another format version.
    """
    try:
        tensors = load(content)
        # The header of a safetensors file: its length in 8 bytes, then JSON.
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__")
    except SafetensorError as error:
        raise _error(place, f"this is no safetensors file, or a truncated one ({error})") from error
    return _assemble(place, _metadata_from(place, header), tensors)


def _assemble(place: str, metadata: TableMetadata, tensors: dict[str, np.ndarray]) -> ThresholdTable:
    try:
        row_lengths = _take(tensors, "longmamba.row_lengths")
        indices = sorted(int(match[1]) for match in map(_RETENTION_KEY.fullmatch, tensors) if match)
        with ThreadPoolExecutor() as pool:
            taken = pool.map(lambda layer: _take_layer(tensors, layer, row_lengths.size), indices)
            layers = dict(zip(indices, taken, strict=True))
        if tensors:
            raise ValueError(f"tensors {sorted(tensors)} are unknown or lack their layer's retention")
        return ThresholdTable(metadata=metadata, row_lengths=row_lengths, layers=layers)
    except (TypeError, ValueError) as error:
        raise _error(place, f"the contents do not fit together ({error})", metadata.model_id) from error


def read_metadata(path: str | os.PathLike[str]) -> TableMetadata:
    """Reads a table's metadata; the tensors stay on disk.

    Raises:
        TableError: no file, no table, a truncated one, or one of another format version.
    """
    return _read(Path(path), with_tensors=False)[0]


def is_table_file(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a table by its header, of whatever format version; False for a file that cannot be read."""
    try:
        with safe_open(path, framework="numpy") as file:
            return _METADATA_KEY in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False


def _error(place: Path | str, problem: str, model_id: str = "MODEL") -> TableError:
    return TableError(f"threshold table {place}: {problem}; make a new one with `longmamba calibrate {model_id}`")


def table_to_bytes(table: ThresholdTable) -> bytes:
    """Returns the content of the file that `save_table` writes; the same table always gives the same bytes."""
    metadata = {_METADATA_KEY: json.dumps(table.metadata.to_dict(), sort_keys=True, allow_nan=False)}
    tensors: dict[str, np.ndarray] = {"longmamba.row_lengths": table.row_lengths}
    raw: dict[str, np.ndarray] = {}
    for layer, thresholds in sorted(table.layers.items()):
        tensors[f"longmamba.layers.{layer}.retention"] = np.ascontiguousarray(thresholds.retention.numpy())
        raw[f"longmamba.layers.{layer}.dt_threshold"] = np.ascontiguousarray(thresholds.dt_threshold.numpy())
    # The cheap bound first: serialising 150 MB only to measure it would double the memory.
    if sum(array.nbytes for array in (*tensors.values(), *raw.values())) <= RAW_LIMIT:
        content: bytes = save(tensors | raw, metadata)
        if len(content) <= RAW_LIMIT:
            return content
    # Packing 100 MB takes seconds of one core.
    with ThreadPoolExecutor() as pool:
        arrays = pool.map(pack_thresholds, raw.values())
        packed = {f"{name}.packed": array for name, array in zip(raw, arrays, strict=True)}
    return bytes(save(tensors | packed, metadata))


def _read(path: Path, with_tensors: bool) -> tuple[TableMetadata, dict[str, np.ndarray]]:
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = _metadata_from(path, file.metadata())
            names = list(file.keys()) if with_tensors else []
            return metadata, {name: file.get_tensor(name) for name in names}
    except FileNotFoundError as error:
        raise _error(path, "there is no such file") from error
    except OSError as error:
        raise _error(path, f"the file cannot be read ({error})") from error
    except SafetensorError as error:
        raise _error(path, f"this is no safetensors file, or a truncated one ({error})") from error


def _metadata_from(path: Path | str, header: dict[str, str] | None) -> TableMetadata:
    text = (header or {}).get(_METADATA_KEY)
    if text is None:
        raise _error(path, f"this safetensors file is no threshold table (metadata {_METADATA_KEY!r} is missing)")
    try:
        content: Any = json.loads(text)
    except ValueError as error:
        raise _error(path, f"the metadata is no JSON ({error})") from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise _error(path, f"written by format version {version}, this release reads {FORMAT_VERSION}")
    optional = set(OPTIONAL)
    expected = {entry.name for entry in fields(TableMetadata)} - optional | (set(content) & optional)
    if set(content) != expected:
        raise _error(
            path, f"metadata missing: {sorted(expected - set(content))}, unknown: {sorted(set(content) - expected)}"
        )
    try:
        return TableMetadata.from_dict(content)
    except ValueError as error:
        raise _error(path, f"the metadata is wrong ({error})") from error


def _take_layer(tensors: dict[str, np.ndarray], layer: int, rows: int) -> LayerThresholds:
    retention = _take(tensors, f"longmamba.layers.{layer}.retention")
    name = f"longmamba.layers.{layer}.dt_threshold"
    if f"{name}.packed" in tensors:
        dt_threshold = unpack_thresholds(tensors.pop(f"{name}.packed"), rows, retention.size)
    else:
        dt_threshold = _take(tensors, name)
    return LayerThresholds(retention=torch.from_numpy(retention), dt_threshold=torch.from_numpy(dt_threshold))


def _take(tensors: dict[str, np.ndarray], name: str) -> np.ndarray:
    if name not in tensors:
        raise ValueError(f"the tensor {name!r} is missing")
    return tensors.pop(name)


def _sync_folder(folder: Path) -> None:
    """Makes the new name last, too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
