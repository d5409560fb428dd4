"""Tests of vllm_longmamba/checkpoint/fingerprint.py."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import write_hf_twin, write_mamba1_original, write_mamba2_original

from vllm_longmamba.checkpoint.fingerprint import weights_fingerprint

WRITERS = {"mamba1": write_mamba1_original, "mamba2": write_mamba2_original}


def fingerprint_of(folder: Path) -> str:
    return weights_fingerprint([str(path) for path in sorted([*folder.glob("*.bin"), *folder.glob("*.safetensors")])])


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "backbone.embedding.weight": torch.randn(6, 4, generator=generator),
        "backbone.norm_f.weight": torch.randn(4, generator=generator),
        "scale": torch.tensor(0.5),
    }


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_same_model_in_every_format(writer: Callable[..., Path], tmp_path: Path) -> None:
    original = writer(tmp_path / "bin", n_layer=2, d_model=32)
    formats = [
        original,
        writer(tmp_path / "safetensors", n_layer=2, d_model=32, safetensors=True),
        write_hf_twin(original, tmp_path / "twin"),
    ]
    fingerprints = {fingerprint_of(folder) for folder in formats}
    assert len(fingerprints) == 1
    assert fingerprint_of(writer(tmp_path / "other", n_layer=2, d_model=32, seed=1)) not in fingerprints


def test_files_of_a_checkpoint_do_not_count(tmp_path: Path) -> None:
    tensors = weights()
    save_file(tensors, tmp_path / "whole.safetensors")
    names = sorted(tensors)
    save_file({names[0]: tensors[names[0]]}, tmp_path / "part-1.safetensors")
    save_file({name: tensors[name] for name in names[1:]}, tmp_path / "part-2.safetensors")
    parts = [str(tmp_path / "part-2.safetensors"), str(tmp_path / "part-1.safetensors")]
    fingerprint = weights_fingerprint([str(tmp_path / "whole.safetensors")])
    assert weights_fingerprint(parts) == fingerprint
    assert len(fingerprint) == 64
    assert int(fingerprint, 16) >= 0


def test_files_before_torch_1_6(tmp_path: Path) -> None:
    torch.save(weights(), tmp_path / "new.bin")
    torch.save(weights(), tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    assert weights_fingerprint([str(tmp_path / "old.bin")]) == weights_fingerprint([str(tmp_path / "new.bin")])


def one_bit(tensors: dict[str, torch.Tensor]) -> None:
    tensors["backbone.norm_f.weight"].view(torch.int32)[3] ^= 1


def scalar(tensors: dict[str, torch.Tensor]) -> None:
    tensors["scale"] = torch.tensor(0.25)


def dtype(tensors: dict[str, torch.Tensor]) -> None:
    tensors["scale"] = tensors["scale"].double()


def bytes_as_integers(tensors: dict[str, torch.Tensor]) -> None:
    tensors["scale"] = tensors["scale"].reshape(1).view(torch.int32).reshape(())


def shape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["backbone.embedding.weight"] = tensors["backbone.embedding.weight"].reshape(4, 6)


def another_name(tensors: dict[str, torch.Tensor]) -> None:
    tensors["scales"] = tensors.pop("scale")


def swapped(tensors: dict[str, torch.Tensor]) -> None:
    tensors["backbone.embedding.weight"] = tensors["backbone.embedding.weight"].flip(0)


def one_more(tensors: dict[str, torch.Tensor]) -> None:
    tensors["more"] = torch.zeros(0)


def untied_head(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["backbone.embedding.weight"] + 1


@pytest.mark.parametrize(
    "change",
    [one_bit, scalar, dtype, bytes_as_integers, shape, another_name, swapped, one_more, untied_head],
    ids=lambda change: change.__name__,
)
def test_every_change_counts(change: Callable[[dict[str, torch.Tensor]], None], tmp_path: Path) -> None:
    before, after = tmp_path / "before.bin", tmp_path / "after.bin"
    torch.save(weights(), before)
    tensors = weights()
    change(tensors)
    torch.save(tensors, after)
    assert weights_fingerprint([str(after)]) != weights_fingerprint([str(before)])


def test_neither_a_repeated_head_nor_the_file_name_counts(tmp_path: Path) -> None:
    torch.save(weights(), tmp_path / "a.bin")
    tied = weights()
    tied["lm_head.weight"] = tied["backbone.embedding.weight"].clone()
    torch.save(tied, tmp_path / "b.bin")
    shutil.copy(tmp_path / "a.bin", tmp_path / "c.pt")
    assert len({weights_fingerprint([str(tmp_path / name)]) for name in ("a.bin", "b.bin", "c.pt")}) == 1


@pytest.mark.parametrize("size", [0, 100], ids=["empty", "truncated"])
def test_damaged_safetensors_file_is_named(tmp_path: Path, size: int) -> None:
    path = tmp_path / "model.safetensors"
    save_file(weights(), path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"model\.safetensors: no safetensors file, or a truncated one .*copy it anew"):
        weights_fingerprint([str(path)])
