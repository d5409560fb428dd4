"""Reads a checkpoint's config and weights, whichever format it is in."""

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_longmamba.checkpoint.original_config import is_original_format, translate_original_config
from vllm_longmamba.checkpoint.table_lookup import is_threshold_table

FAMILIES = ("mamba", "mamba2", "falcon_mamba")


@dataclass(frozen=True)
class Checkpoint:
    """A pure Mamba language model on disk.

    Attributes:
        config: under transformers' names, `model_type` one of `FAMILIES`.
        weights: on the CPU, as stored, under the original names (`backbone.embedding.weight`, ...).
        files: the weight files.
    """

    config: Mapping[str, Any]
    weights: Mapping[str, torch.Tensor]
    files: tuple[Path, ...]


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint in the original state-spaces format or in that of Hugging Face.

    Args:
        folder: holds config.json and *.safetensors or *.bin.

    Raises:
        ValueError: no config or no weights, another family of models, or an option that is not implemented here.
    """
    config = read_config(folder)
    files = weight_files(folder)
    weights: dict[str, torch.Tensor] = {}
    for file in files:
        for name, tensor in _read_tensors(file).items():
            weights[name.replace("backbone.embeddings.", "backbone.embedding.", 1)] = tensor
    return Checkpoint(config, weights, files)


def read_config(folder: Path) -> Mapping[str, Any]:
    """A checkpoint's config under transformers' names.

    Raises:
        ValueError: there is none, another family of models, or an option that is not implemented here.
    """
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise ValueError(f"{folder}: there is no config.json; name the folder of a checkpoint")
    config: dict[str, Any] = json.loads(config_file.read_text())
    if is_original_format(config):
        config = translate_original_config(config)
    _check_config(folder, config)
    return config


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The weight files of a folder: safetensors where there are some, threshold tables not among them.

    Raises:
        ValueError: there are none.
    """
    safetensors = [file for file in sorted(folder.glob("*.safetensors")) if not is_threshold_table(file)]
    files = tuple(safetensors or sorted(folder.glob("*.bin")))
    if not files:
        raise ValueError(f"{folder}: there are no weights (*.safetensors or *.bin); name the folder of a checkpoint")
    return files


def _check_config(folder: Path, config: Mapping[str, Any]) -> None:
    place = f"{folder / 'config.json'}"
    if config.get("model_type") not in FAMILIES:
        raise ValueError(
            f"{place}: the torch reference runs {', '.join(FAMILIES)}, but model_type is {config.get('model_type')!r}; "
            "use the engine for hybrids"
        )
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{place}: hidden_act must be 'silu', but is {config['hidden_act']!r}")
    limit = tuple(_number(value) for value in config.get("time_step_limit", (0.0, "inf")))
    if config["model_type"] == "mamba2" and limit != (0.0, float("inf")):
        raise ValueError(f"{place}: a time_step_limit is not implemented here, nor in vLLM, but is {limit}")


def _number(value: Any) -> float:
    """transformers writes infinity as {"__float__": "Infinity"}."""
    return float(value["__float__"] if isinstance(value, dict) else value)


def _read_tensors(file: Path) -> dict[str, torch.Tensor]:
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return dict(load_file(file))
    # Files of the time before torch 1.6 are no zip archives and cannot be mapped into memory.
    return dict(torch.load(file, map_location="cpu", mmap=zipfile.is_zipfile(file), weights_only=True))
