"""Tables as safetensors files: the same table always gives the same bytes, and a file is whole or absent.

One metadata key, "longmamba", holds all metadata as sorted JSON (safetensors keeps no order between keys), and in it a
"checksum" of them and of the tensors. Tensors, all with the prefix "longmamba." that no model's weights have:
"row_lengths" (rows,) int64; for each layer N "layers.N.retention" (channels,) float64 and "layers.N.dt_threshold"
(rows, channels) float32. The table of mamba-1.4b for prompts of 131,072 tokens has 105 MB.
"""

import json
import os
import re
import secrets
import time
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blake3 import blake3
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load, save

from .metadata import FORMAT_VERSION, TableMetadata
from .table import LayerThresholds, ThresholdTable

_METADATA_KEY = "longmamba"
_RETENTION_KEY = re.compile(r"longmamba\.layers\.(0|[1-9][0-9]{0,8})\.retention")
# Seconds after which a temporary file belongs to no running writer.
_LEFT_OVER_AFTER = 24 * 3600


class TableError(ValueError):
    """A file that cannot be used as a threshold table; the message names the file and what to do."""


def save_table(table: ThresholdTable, path: str | os.PathLike[str]) -> None:
    """Writes a table; an existing file is replaced only once the new one is complete on disk.

    Args:
        table: the table.
        path: file to write; its folder must exist. What writers of this file that were killed more than a day ago have
            left beside it is deleted.

    Raises:
        OSError: the file cannot be written; nothing is left behind.
    """
    save_bytes(table_to_bytes(table), path)


def save_bytes(content: bytes, path: str | os.PathLike[str]) -> None:
    """Writes what `table_to_bytes` returned, as `save_table` does."""
    target = Path(path)
    _delete_left_over(target)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    # Not tempfile: it would hide the table from other users (mode 0600). "x" follows no link that lies there.
    with open(temporary, "xb") as file:
        try:
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
    # A file of weights, which may be large, is refused before its tensors are read.
    read_metadata(path)
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise _error(path, f"the file cannot be read ({error})") from error
    return table_from_bytes(content, path)


def table_from_bytes(content: bytes, place: str | os.PathLike[str] = "in memory") -> ThresholdTable:
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
    except (SafetensorError, KeyError) as error:  # KeyError: a type of numbers that NumPy has not
        raise _error(place, f"this is no safetensors file, or a truncated one ({error})") from error
    metadata, checksum = _parse(place, header)
    if checksum != _checksum(metadata, tensors):
        raise _error(place, "the file is damaged, its contents do not have its checksum", metadata.model_id)
    try:
        row_lengths = _take(tensors, "longmamba.row_lengths")
        indices = sorted(int(match[1]) for match in map(_RETENTION_KEY.fullmatch, tensors) if match)
        layers = {layer: _take_layer(tensors, layer) for layer in indices}
        if tensors:
            raise ValueError(f"tensors {sorted(tensors)} are unknown or lack their layer's retention")
        return ThresholdTable(metadata=metadata, row_lengths=row_lengths, layers=layers)
    except (TypeError, ValueError) as error:
        raise _error(place, f"the contents do not fit together ({error})", metadata.model_id) from error


def table_to_bytes(table: ThresholdTable) -> bytes:
    """Returns the content of the file that `save_table` writes; the same table always gives the same bytes."""
    tensors: dict[str, np.ndarray] = {"longmamba.row_lengths": table.row_lengths}
    for layer, thresholds in table.layers.items():
        tensors[f"longmamba.layers.{layer}.retention"] = np.ascontiguousarray(thresholds.retention.numpy())
        tensors[f"longmamba.layers.{layer}.dt_threshold"] = np.ascontiguousarray(thresholds.dt_threshold.numpy())
    values = asdict(table.metadata) | {"checksum": _checksum(table.metadata, tensors)}
    return bytes(save(tensors, {_METADATA_KEY: json.dumps(values, sort_keys=True, allow_nan=False)}))


def read_metadata(path: str | os.PathLike[str]) -> TableMetadata:
    """Reads a table's metadata; the tensors stay on disk, and the checksum is not compared.

    Raises:
        TableError: no file, no table, a truncated one, or one of another format version.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            header = file.metadata()
    except FileNotFoundError as error:
        raise _error(path, "there is no such file") from error
    except OSError as error:
        raise _error(path, f"the file cannot be read ({error})") from error
    except SafetensorError as error:
        raise _error(path, f"this is no safetensors file, or a truncated one ({error})") from error
    return _parse(path, header)[0]


def is_table_file(path: str | os.PathLike[str]) -> bool:
    """Returns whether a file is a table by its header, of whatever format version; False if it cannot be read."""
    try:
        with safe_open(path, framework="numpy") as file:
            return _METADATA_KEY in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False


def _error(place: str | os.PathLike[str], problem: str, model_id: str = "MODEL") -> TableError:
    return TableError(f"threshold table {place}: {problem}; make a new one with `longmamba calibrate {model_id}`")


def _parse(place: str | os.PathLike[str], header: dict[str, str] | None) -> tuple[TableMetadata, Any]:
    """Reads the metadata, and the checksum as the file gives it."""
    text = (header or {}).get(_METADATA_KEY)
    if text is None:
        raise _error(place, f"this safetensors file is no threshold table (metadata {_METADATA_KEY!r} is missing)")
    try:
        content: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _error(place, f"the metadata is no JSON ({error})") from error
    content = content if isinstance(content, dict) else {}
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        problem = f"written by format version {str(version)[:20]}, this release reads {FORMAT_VERSION}"
        raise _error(place, problem, str(content.get("model_id", "MODEL"))[:200])
    expected = {entry.name for entry in fields(TableMetadata)} | {"checksum"}
    if set(content) != expected:
        raise _error(
            place, f"metadata missing: {sorted(expected - set(content))}, unknown: {sorted(set(content) - expected)}"
        )
    checksum = content.pop("checksum")
    try:
        return TableMetadata(**content), checksum
    except ValueError as error:
        raise _error(place, f"the metadata is wrong ({error})") from error


def _checksum(metadata: TableMetadata, tensors: dict[str, np.ndarray]) -> str:
    """Returns 64 hexadecimal digits that stand for all metadata and for names, types, shapes and bytes of tensors."""
    content = blake3(json.dumps(asdict(metadata), sort_keys=True).encode())
    for name, array in sorted(tensors.items()):
        content.update(repr((name, array.dtype.str, array.shape)).encode())
        content.update(array.tobytes())
    return content.hexdigest()


def _take_layer(tensors: dict[str, np.ndarray], layer: int) -> LayerThresholds:
    retention = _take(tensors, f"longmamba.layers.{layer}.retention")
    dt_threshold = _take(tensors, f"longmamba.layers.{layer}.dt_threshold")
    return LayerThresholds(retention=torch.from_numpy(retention), dt_threshold=torch.from_numpy(dt_threshold))


def _take(tensors: dict[str, np.ndarray], name: str) -> np.ndarray:
    if name not in tensors:
        raise ValueError(f"the tensor {name!r} is missing")
    return tensors.pop(name)


def _delete_left_over(target: Path) -> None:
    """Deletes the temporary files of this target whose writers were killed; never one that may still be written."""
    own = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{16}}\.tmp")
    with suppress(OSError):
        for path in target.parent.iterdir():
            if own.fullmatch(path.name) and path.lstat().st_mtime < time.time() - _LEFT_OVER_AFTER:
                path.unlink()


def _sync_folder(folder: Path) -> None:
    """Makes the new name last, too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
