"""Reads files of `torch.save` that come from strangers: no code of theirs runs, and no more memory than their size."""

import os
import zipfile
from pathlib import Path
from typing import Any

import torch

# A tensor that a checkpoint stores once may have several names: a tied head, or the shared blocks of a hybrid.
_MOST_NAMES = 4


def load_weights_file(file: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """Reads the weights of a checkpoint, a .bin or .pt file: name -> dense tensor.

    Raises:
        ValueError: as `load_torch_file`, or the file holds anything but named tensors.
    """
    content = load_torch_file(file)
    if not isinstance(content, dict):
        raise ValueError(f"{file}: a checkpoint must map names to tensors, but is a {type(content).__name__}")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            # Passed over, all checkpoints that nest their tensors would have the fingerprint of an empty one.
            raise ValueError(f"{file}: {name!r} must be a tensor, but is a {type(tensor).__name__}")
    return content


def load_torch_file(file: str | os.PathLike[str]) -> Any:
    """Reads a tensor, or a dict of them, from a file of `torch.save`; one of torch 1.6 or later is mapped into memory.

    Returns:
        What was saved. A tensor, or each value of a dict that is one, is dense and all of it is in the file.

    Raises:
        ValueError: the file cannot be read without running code, a tensor is not dense, or tensors describe more data
            than the file has.
    """
    content = _load(file, map_location="meta", mmap=False)
    named = content if isinstance(content, dict) else {"the file": content}
    _check_tensors(file, {str(name): tensor for name, tensor in named.items() if isinstance(tensor, torch.Tensor)})
    return _load(file, map_location="cpu", mmap=zipfile.is_zipfile(file))


def _load(file: str | os.PathLike[str], **arguments: Any) -> Any:
    try:
        if zipfile.is_zipfile(file):
            _refuse_compression(file)
        return torch.load(file, weights_only=True, **arguments)
    except Exception as error:
        # What a damaged file makes torch raise is of any kind, and its advice is to run the file's code.
        reason = "it is damaged, or holds more than tensors"
        if isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        raise ValueError(
            f"{file}: cannot be read as tensors ({reason}); only files of torch.save that hold nothing but tensors "
            "are accepted, because others can run code: save the tensors alone, or as safetensors"
        ) from None


def _refuse_compression(file: str | os.PathLike[str]) -> None:
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    # torch compresses nothing, and lays entries one after the other.
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise zipfile.BadZipFile
    if sum(entry.file_size for entry in entries) > Path(file).stat().st_size:
        raise zipfile.BadZipFile


def _check_tensors(file: str | os.PathLike[str], tensors: dict[str, torch.Tensor]) -> None:
    size = Path(file).stat().st_size
    total = 0
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise ValueError(f"{file}: {name!r} must be a dense tensor, but is of another layout; save it dense")
        described, stored = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
        total += described
        if described > stored or stored > size:
            raise ValueError(
                f"{file}: {name!r} must be stored in full, but {tuple(tensor.shape)} of {tensor.dtype} are {described} "
                f"bytes, of which the file of {size} stores {min(stored, size)}; save it with .contiguous()"
            )
    if total > _MOST_NAMES * size:
        raise ValueError(
            f"{file}: the tensors together must not have more than {_MOST_NAMES} times the bytes of the file, but have "
            f"{total} in a file of {size}; save each tensor once"
        )
