"""Batches of training sequences, drawn by worker processes."""

import signal
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from .corpus import Corpus
from .settings import Settings, Stage
from .tasks import TaskWriter


class Batch(NamedTuple):
    """Rows of sequences, each row as long as the training length.

    Attributes:
        inputs, targets: (batch, length) int32 tokens.
        kinds: (batch, length) uint8 of the targets, see tasks.py.
        seq_idx: (length,) int32, which sequence of its row a token is of.
        stage: index of the stage that it is for.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    kinds: torch.Tensor
    seq_idx: torch.Tensor
    stage: int


def make_batch(writer: TaskWriter, settings: Settings, stage: int, rng: np.random.Generator) -> Batch:
    """Draws the sequences of one step."""
    of: Stage = settings.stages[stage]
    sequences = settings.batch * settings.length // of.length
    shares = np.array(list(of.shares.values()))
    tasks = rng.choice(list(of.shares), size=sequences, p=shares / shares.sum())
    drawn = [writer.draw(rng, str(task), of.length + 1) for task in tasks]
    tokens = torch.from_numpy(np.stack([tokens for tokens, _ in drawn]))
    kinds = torch.from_numpy(np.stack([kinds for _, kinds in drawn]))
    rows = (settings.batch, settings.length)
    seq_idx = torch.arange(settings.length, dtype=torch.int32) // of.length
    return Batch(tokens[:, :-1].reshape(rows), tokens[:, 1:].reshape(rows), kinds[:, 1:].reshape(rows), seq_idx, stage)


class Batches(IterableDataset[Batch]):
    """Batches without end.

    Attributes:
        stage: (1,) int64 in shared memory, index of the stage to draw for. Those that workers have ready come first.
    """

    def __init__(self, corpus: Corpus, settings: Settings) -> None:
        self.writer, self.settings = TaskWriter(corpus), settings
        self.stage = torch.zeros(1, dtype=torch.int64).share_memory_()

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        rng = np.random.default_rng((self.settings.seed, worker.id if worker else 0))
        while True:
            yield make_batch(self.writer, self.settings, int(self.stage), rng)

    def load(self, workers: int) -> Iterator[Batch]:
        """Draws in so many processes; 0: in this one."""
        loader = DataLoader(
            self,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=2 if workers else None,
            multiprocessing_context="fork" if workers else None,
            worker_init_fn=_ignore_signals,
            pin_memory=torch.cuda.is_available(),
        )
        return iter(loader)


def _ignore_signals(_: int) -> None:
    """A signal that ends the run is for the main process, which needs no error of its workers."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
