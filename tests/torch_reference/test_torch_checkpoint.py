"""Reading checkpoints."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import write_zamba2
from torch_models.checkpoint import read_checkpoint

Tiny = Callable[[str], Path]


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_both_formats_give_the_same(tiny: Tiny, family: str) -> None:
    original, twin = read_checkpoint(tiny(family)), read_checkpoint(tiny(f"{family}-hf"))
    assert original.weights.keys() - {"lm_head.weight"} == twin.weights.keys() - {"lm_head.weight"}
    for name, weight in twin.weights.items():
        assert torch.equal(weight, original.weights[name])
    for key in ("model_type", "num_hidden_layers", "layer_norm_epsilon"):
        assert original.config[key] == twin.config[key]


def test_a_table_beside_the_weights_is_no_weights(tiny: Tiny, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny("mamba1"), tmp_path / "model")
    (folder / "longmamba.safetensors").write_bytes(b"not read")
    assert [file.name for file in read_checkpoint(folder).files] == ["pytorch_model.bin"]


def _changed(folder: Path, path: Path, **changes: object) -> Path:
    shutil.copytree(folder, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act must be 'silu'"),
        ({"time_step_limit": [0.0, 0.1]}, "time_step_limit is not implemented"),
        ({"model_type": "llama"}, "model_type is 'llama'"),
    ],
    ids=["activation", "limit", "family"],
)
def test_refused_options(tiny: Tiny, tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_checkpoint(_changed(tiny("mamba2-hf"), tmp_path / "model", **changes))


def test_refused_folders(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config\.json"):
        read_checkpoint(tmp_path)
    shutil.copyfile(tiny("mamba1") / "config.json", tmp_path / "config.json")
    with pytest.raises(ValueError, match="no weights"):
        read_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="use the engine for hybrids"):
        read_checkpoint(write_zamba2(tmp_path / "zamba2"))
