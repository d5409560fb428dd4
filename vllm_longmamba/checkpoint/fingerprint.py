"""A fingerprint of a checkpoint's weights, so that a threshold table is never used with another model."""

from collections.abc import Iterator
from pathlib import Path

import torch
from blake3 import blake3

from vllm_longmamba.checkpoint.torch_files import load_weights_file

DUMMY = "dummy"  # fingerprint of `load_format="dummy"`, which has no weights on disk

_EMBEDDINGS = "backbone.embeddings.weight"
_LM_HEAD = "lm_head.weight"


def weights_fingerprint(files: list[str]) -> str:
    """Hash every tensor of a checkpoint, whatever files hold them.

    The original and the Hugging Face format of one model have the same fingerprint, of 64 hexadecimal digits: names are
    brought to one form, a head that only repeats the embedding is left out, and file boundaries do not count.

    Raises:
        ValueError: a file cannot be read, or holds something other than tensors; see `load_weights_file`.
    """
    digests: dict[str, str] = {}
    for file in sorted(files):
        for name, tensor in _tensors(file):
            # A zero-dimensional tensor cannot be viewed as bytes.
            tensor = tensor.reshape(1) if tensor.dim() == 0 else tensor
            data = tensor.contiguous().view(torch.uint8).reshape(-1).numpy()
            content = blake3(data, max_threads=blake3.AUTO).hexdigest()  # type: ignore[arg-type]
            name = name.replace("backbone.embedding.", "backbone.embeddings.", 1)
            digests[name] = f"{tensor.dtype} {tuple(tensor.shape)} {content}"
    if digests.get(_LM_HEAD) == digests.get(_EMBEDDINGS):
        digests.pop(_LM_HEAD, None)
    return blake3("\n".join(f"{name} {digests[name]}" for name in sorted(digests)).encode()).hexdigest()


def _tensors(file: str) -> Iterator[tuple[str, torch.Tensor]]:
    if Path(file).suffix != ".safetensors":
        yield from load_weights_file(file).items()
        return
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as checkpoint:
            for name in checkpoint.keys():  # noqa: SIM118 - not a dict
                yield name, checkpoint.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(f"{file}: no safetensors file, or a truncated one ({error}); copy it anew") from error
