"""Tests of vllm_longmamba/checkpoint/torch_files.py."""

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_longmamba.checkpoint.fingerprint import weights_fingerprint
from vllm_longmamba.checkpoint.torch_files import load_torch_file, load_weights_file

TEN_GB = 10 * 2**30


class Malicious:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (f"{os.environ['PLANTED']}",)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_load_torch_file(zipped: bool, tmp_path: Path) -> None:
    whole = torch.randn(7, 3)
    tensors = {"w": whole, "again": whole, "part": whole[2:4], "none": torch.zeros(0, 5), "number": torch.tensor(0.5)}
    torch.save(tensors, tmp_path / "w.bin", _use_new_zipfile_serialization=zipped)
    for load in (load_torch_file, load_weights_file):
        loaded = load(tmp_path / "w.bin")
        assert {name: tensor.shape for name, tensor in loaded.items()} == {n: t.shape for n, t in tensors.items()}
        assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_load_torch_file_of_one_tensor(tmp_path: Path) -> None:
    torch.save(torch.arange(3.0), tmp_path / "w.pt")
    assert load_torch_file(tmp_path / "w.pt").tolist() == [0, 1, 2]


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("in_dict", [True, False], ids=["dict", "tensor"])
def test_load_torch_file_refuses_expanded_tensors(in_dict: bool, zipped: bool, tmp_path: Path) -> None:
    file, expanded = tmp_path / "w.bin", torch.zeros(1, dtype=torch.uint8).expand(TEN_GB)
    torch.save({"w": expanded} if in_dict else expanded, file, _use_new_zipfile_serialization=zipped)
    message = rf"must be stored in full, but \({TEN_GB},\) of torch.uint8 are {TEN_GB} bytes, of which the file of "
    with pytest.raises(ValueError, match=message) as refusal:
        load_torch_file(file)
    assert str(refusal.value).startswith(str(file))
    assert "save it with .contiguous()" in str(refusal.value)
    if in_dict:
        with pytest.raises(ValueError, match=message):
            weights_fingerprint([str(file)])


def test_load_torch_file_refuses_one_storage_under_many_names(tmp_path: Path) -> None:
    weight = torch.zeros(100_000)
    torch.save({str(number): weight for number in range(4)}, tmp_path / "tied.bin")
    assert len(load_torch_file(tmp_path / "tied.bin")) == 4
    torch.save({str(number): weight for number in range(5)}, tmp_path / "more.bin")
    with pytest.raises(ValueError, match="more than 4 times the bytes of the file, but have 2000000 in a file"):
        load_torch_file(tmp_path / "more.bin")


def edited(file: Path, name: str, change: Callable[[bytes], bytes], **writing: Any) -> None:
    """Write a file of torch.save again with one entry changed."""
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(file, "w") as archive:
        for entry, content in entries.items():
            is_this = entry.endswith(name)
            archive.writestr(entry, change(content) if is_this else content, **(writing if is_this else {}))


def test_load_torch_file_refuses_a_storage_that_claims_more(tmp_path: Path) -> None:
    file = tmp_path / "w.bin"
    torch.save({"w": torch.zeros(77, 2)}, file)

    def claim(content: bytes) -> bytes:
        # The pickle names 154 numbers, in a tensor of 77 by 2.
        return content.replace(b"K\x9a", b"J\xff\xff\xff\x7f").replace(b"KM", b"J\xff\xff\xff\x3f")

    edited(
        file,
        "data.pkl",
        lambda content: content.replace(b"K\x9a", b"J\xff\xff\xff\x7f").replace(b"KM", b"J\xff\xff\xff\x3f"),
    )
    with pytest.raises(ValueError, match=r"must be stored in full, but \(1073741823, 2\) of torch.float32"):
        load_torch_file(file)


def test_load_torch_file_refuses_compressed_entries(tmp_path: Path) -> None:
    file = tmp_path / "w.bin"
    torch.save({"w": torch.zeros(3)}, file)
    padded = lambda content: content + bytes(50_000_000)  # noqa: E731
    edited(file, "data.pkl", padded, compress_type=zipfile.ZIP_DEFLATED)
    assert file.stat().st_size < 100_000
    with pytest.raises(ValueError, match=r"cannot be read as tensors \(it is damaged, or holds more"):
        load_torch_file(file)


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", b"PK\x03\x04 a torn zip", pickle.dumps({"w": [[1.0]]}, protocol=2), None],
    ids=["empty", "text", "torn", "pickle", "missing"],
)
def test_load_torch_file_refuses_other_files(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "w.bin"
    if content is not None:
        file.write_bytes(content)
    reason = "No such file or directory" if content is None else "it is damaged, or holds more than tensors"
    with pytest.raises(ValueError, match=rf"cannot be read as tensors \({reason}\); only files of torch.save") as error:
        load_torch_file(file)
    assert str(file) in str(error.value)


def test_load_torch_file_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANTED", str(tmp_path / "planted"))
    file = tmp_path / "w.bin"
    torch.save({"w": torch.zeros(3), "other": Malicious()}, file)
    with pytest.raises(ValueError, match=r"cannot be read as tensors \(it is damaged, or holds more") as error:
        load_torch_file(file)
    assert "weights_only" not in str(error.value)
    assert error.value.__suppress_context__, "torch's message advises to run the code"
    assert not (tmp_path / "planted").exists()


def test_load_torch_file_refuses_sparse_tensors(tmp_path: Path) -> None:
    torch.save({"w": torch.eye(3).to_sparse()}, tmp_path / "w.bin")
    with pytest.raises(ValueError, match="'w' must be a dense tensor"):
        load_torch_file(tmp_path / "w.bin")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(3)], r"a checkpoint must map names to tensors, but is a list"),
        (torch.zeros(3), r"a checkpoint must map names to tensors, but is a Tensor"),
        ({"state_dict": {"w": torch.zeros(3)}}, r"'state_dict' must be a tensor, but is a dict"),
        ({"w": torch.zeros(3), "step": 7}, r"'step' must be a tensor, but is a int"),
        ({7: torch.zeros(3)}, r"7 must be a tensor"),
    ],
    ids=["list", "tensor", "nested", "number", "name"],
)
def test_load_weights_file_refuses_other_contents(content: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save(content, path)
    for load in (load_weights_file, lambda path: weights_fingerprint([str(path)])):
        with pytest.raises(ValueError, match=message) as error:
            load(path)
        assert str(path) in str(error.value)
