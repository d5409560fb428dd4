"""The training package of examples/train, importable as `train`, with a small corpus for it."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
# behind everything else: examples/ holds modules of common names
sys.path.append(str(EXAMPLES))

from train.corpus import Corpus, load_corpus, prepare  # noqa: E402


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def text_file() -> Path:
    """A book in plain text."""
    return EXAMPLES / "texts" / "calibration.txt"


@pytest.fixture(scope="session")
def corpus_folder(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the book, with a tokenizer of 512 tokens."""
    folder = tmp_path_factory.mktemp("corpus")
    prepare([text_file], folder, vocabulary=512, tokens=1_000_000)
    return folder


@pytest.fixture(scope="session")
def corpus(corpus_folder: Path) -> Corpus:
    return load_corpus(corpus_folder)
