"""Turns the calibration files that LongMamba's authors released into a threshold table.

Their format, from load_align_target.py, get_max.py and mamba_ssm/modules/mamba2.py of github.com/GATECH-EIC/LongMamba:

- `tA_prod/tA_prod_layer_N.pt`: a tensor (channels,), the retention. For Mamba-2 it is exp(A * sum_t dt_t) over 2000
  tokens (Zamba2: 4000), for Mamba-1 the product over the tokens of the mean over d_state of exp(dt_t A). The dt's were
  clamped before. Mean or maximum over the sequences. A channel with tA_prod > c is global.
- `delta_t-thre/delta_t-thre_layer_N.pt`: a dict of tensors (channels,), with 25 keys "1k", "2k", ... "192k" for prompts
  of 1000, 2000, ... tokens; "1k" and "2k" are all zeros. A token of dt > threshold is kept.
- N counts the model's Mamba layers. `alpha/`, `decay/` and `A/` beside them are not needed.

So both comparisons are ours. Entries up to the training length are dropped, because such prompts are not filtered. For
Zamba2 that also drops "3k" and "4k": a curve of no more points than the 4000 calibration tokens cannot exceed their
sum, and the authors' search then takes its first point.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blake3 import blake3

from vllm_longmamba import __version__
from vllm_longmamba.calibration.sequences import model_name
from vllm_longmamba.calibration.settings import default_clamp_percent
from vllm_longmamba.checkpoint.shapes import ModelFiles
from vllm_longmamba.checkpoint.torch_files import load_torch_file
from vllm_longmamba.tables import LayerThresholds, TableMetadata, ThresholdTable

METHOD = "GATECH-EIC/LongMamba"
_FOLDERS = ("tA_prod", "delta_t-thre")
_KEY = re.compile(r"([1-9][0-9]*)k")


@dataclass(frozen=True)
class ReleasedLayer:
    """What the released files hold for one layer.

    Attributes:
        retention: (channels,) float64.
        thresholds: prompt length in tokens -> (channels,) float32, in units of dt.
    """

    retention: torch.Tensor
    thresholds: dict[int, torch.Tensor]


@dataclass(frozen=True)
class ReleaseSettings:
    """What the released files do not say of themselves.

    Attributes:
        train_length: the paper's L; by default what is known of the model.
        min_retention: the paper's theta (`-c` of the authors' scripts).
        clamp_percent: the paper's C; by default 20 for Mamba-1 and 5 for Mamba-2 layers.
        num_sequences: calibration sequences.
    """

    train_length: int | None = None
    min_retention: float = 1e-2
    clamp_percent: float | None = None
    num_sequences: int = 5


def import_table(folder: Path, model: ModelFiles, settings: ReleaseSettings | None = None) -> ThresholdTable:
    """Make a threshold table of the released files of a model.

    Args:
        folder: holds `tA_prod/` and `delta_t-thre/`.
        model: the model that the files were made for.
        settings: see `ReleaseSettings`.

    Returns:
        The table, not yet saved.

    Raises:
        ValueError: files missing, unreadable, inconsistent, or of another model.
    """
    settings = settings or ReleaseSettings()
    length = settings.train_length if settings.train_length is not None else model.train_length()
    released = read_release(folder)
    layers = _match_layers(folder, released, model)
    lengths = [key for key in released[0].thresholds if key > length]
    if not lengths:
        raise ValueError(
            f"{folder}: the longest thresholds are for {max(released[0].thresholds)} tokens, but prompts up to the "
            f"training length of {length} are not filtered; check --train-length"
        )
    clamp_percent = settings.clamp_percent
    if clamp_percent is None:
        clamp_percent = default_clamp_percent(model.architecture)
    metadata = TableMetadata(
        model_id=model_name(model.name),
        weights_fingerprint=model.weights.fingerprint,
        train_length=length,
        corpus=f"files released by the authors, {folder.resolve().name} (blake3 {_digest(folder)})",
        clamp_percent=clamp_percent,
        min_retention=settings.min_retention,
        num_sequences=settings.num_sequences,
        seed=0,
        tool_version=f"vllm_longmamba {__version__}",
        method=METHOD,
    )
    thresholds = {layer: _to_rows(content, lengths) for layer, content in layers.items()}
    return ThresholdTable(metadata=metadata, row_lengths=np.array([length, *lengths]), layers=thresholds)


def read_release(folder: Path) -> list[ReleasedLayer]:
    """Read all layers of a release.

    Args:
        folder: holds `tA_prod/` and `delta_t-thre/`.

    Returns:
        The layers in the order of their numbers, with the same lengths (ascending) in each.

    Raises:
        ValueError: a folder or layer is missing, a file is unreadable, or its contents have another form.
    """
    files = [_numbered_files(folder / name, name) for name in _FOLDERS]
    if missing := sorted(set(files[0]) ^ set(files[1])):
        raise ValueError(f"{folder}: layers {missing} are in only one of {' and '.join(_FOLDERS)}; unpack it again")
    if missing := sorted(set(range(max(files[0]) + 1)) - set(files[0])):
        raise ValueError(f"{folder}: the files of layers {missing} are missing; unpack the release again")
    layers = [_read_layer(files[0][layer], files[1][layer]) for layer in sorted(files[0])]
    for layer, content in enumerate(layers):
        if list(content.thresholds) != list(layers[0].thresholds):
            raise ValueError(
                f"{files[1][layer]}: has thresholds for {list(content.thresholds)} tokens, but layer 0 for "
                f"{list(layers[0].thresholds)}; all layers must have the same keys"
            )
    return layers


def _numbered_files(folder: Path, stem: str) -> dict[int, Path]:
    pattern = re.compile(re.escape(stem) + r"_layer_(0|[1-9][0-9]*)\.pt")
    matches = [(pattern.fullmatch(path.name), path) for path in folder.glob("*.pt")]
    files = {int(match[1]): path for match, path in matches if match}
    if not files:
        raise ValueError(
            f"{folder}: there must be files {stem}_layer_0.pt, {stem}_layer_1.pt, ..., but there is none; name the "
            f"folder that holds {' and '.join(_FOLDERS)}"
        )
    return files


def _read_layer(retention_file: Path, threshold_file: Path) -> ReleasedLayer:
    retention = _vector(load_torch_file(retention_file), retention_file, "the file", upper=1.0).double()
    content = load_torch_file(threshold_file)
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{threshold_file}: must hold a dict of tensors, but holds a {type(content).__name__}")
    thresholds: dict[int, torch.Tensor] = {}
    for key, value in content.items():
        match = _KEY.fullmatch(key) if isinstance(key, str) else None
        if match is None:
            raise ValueError(f'{threshold_file}: keys must be prompt lengths such as "3k", but one is {key!r}')
        vector = _vector(value, threshold_file, repr(key), upper=float("inf"))
        if vector.shape != retention.shape:
            raise ValueError(
                f"{threshold_file}: {key!r} has {vector.shape[0]} channels, but {retention_file.name} has "
                f"{retention.shape[0]}; both must be of one model"
            )
        thresholds[1000 * int(match[1])] = vector.float()
    return ReleasedLayer(retention, dict(sorted(thresholds.items())))


def _vector(value: Any, file: Path, what: str, upper: float) -> torch.Tensor:
    if not isinstance(value, torch.Tensor) or value.ndim != 1 or not value.is_floating_point() or value.numel() == 0:
        shape = f"of shape {tuple(value.shape)}, {value.dtype}" if isinstance(value, torch.Tensor) else ""
        raise ValueError(f"{file}: {what} must be a floating (channels,) tensor, got a {type(value).__name__} {shape}")
    if not bool(((value >= 0) & (value <= upper) & value.isfinite()).all()):
        raise ValueError(f"{file}: {what} must lie between 0 and {upper}, got NaN or a value outside")
    return value.detach()


def _match_layers(folder: Path, released: list[ReleasedLayer], model: ModelFiles) -> dict[int, ReleasedLayer]:
    channels = model.channels()
    if len(released) != len(channels):
        raise ValueError(
            f"{folder}: holds {len(released)} layers, but {model.name!r} has {len(channels)} Mamba layers; the files "
            "were made for another model"
        )
    matched = dict(zip(channels, released, strict=True))
    for layer, content in matched.items():
        if content.retention.shape[0] != channels[layer]:
            raise ValueError(
                f"{folder}: has {content.retention.shape[0]} channels where layer {layer} of {model.name!r} has "
                f"{channels[layer]}; the files were made for another model"
            )
    return matched


def _to_rows(content: ReleasedLayer, lengths: list[int]) -> LayerThresholds:
    no_filter = torch.full((1, content.retention.shape[0]), -1.0, dtype=torch.float32)
    rows = torch.stack([content.thresholds[length] for length in lengths])
    return LayerThresholds(retention=content.retention, dt_threshold=torch.cat([no_filter, rows]))


def _digest(folder: Path) -> str:
    content = blake3()
    for name in _FOLDERS:
        for _, file in sorted(_numbered_files(folder / name, name).items()):
            content.update(file.read_bytes())
    return content.hexdigest()[:16]
