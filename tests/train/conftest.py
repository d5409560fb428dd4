"""The training package of examples/train, importable as `train`, and small settings and texts for it."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
# behind everything else: examples/ holds modules of common names
sys.path.append(str(EXAMPLES))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def text_file() -> Path:
    """A book in plain text."""
    return EXAMPLES / "texts" / "calibration.txt"
