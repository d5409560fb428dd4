"""Tiny checkpoints of the families that the torch reference runs, one thread, the CPU."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tiny_models import write_falcon_mamba, write_hf_twin, write_mamba1_original, write_mamba2_original

sys.path.append(str(Path(__file__).resolve().parents[1] / "references"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """tiny("mamba2") is the folder of a checkpoint; "-hf" for its Hugging Face twin."""
    writers = {
        "mamba1": write_mamba1_original,
        "mamba2": write_mamba2_original,
        "falcon_mamba": write_falcon_mamba,
        "mamba1-safetensors": lambda path: write_mamba1_original(path, safetensors=True),
        "mamba1-hf": lambda path: write_hf_twin(folder("mamba1"), path),
        "mamba2-hf": lambda path: write_hf_twin(folder("mamba2"), path),
    }
    root = tmp_path_factory.mktemp("tiny")

    def folder(name: str) -> Path:
        path = root / name
        return path if path.exists() else writers[name](path)

    return folder


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The models are tiny: a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
