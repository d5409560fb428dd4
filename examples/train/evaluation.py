"""Accuracy on the tasks and loss on unseen text, during training."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from .books import windows
from .nouns import NOUNS
from .sentences import DIGITS, Sentences, write_sentences
from .settings import Settings
from .tasks import make_batch, mix_tasks

TOKENS_AT_ONCE = 65_536
MEASURED = ("passkey", "four_needles")
LONGER = (1, 2, 4, 8)  # lengths of the last evaluation, in training lengths
ATTENTION_WINDOW = 64


def precision(settings: Settings, device: torch.device) -> AbstractContextManager[object]:
    """The context under which a model runs."""
    return torch.autocast(device.type, torch.bfloat16) if settings.bf16 else nullcontext()


def evaluation_of(settings: Settings, held_out: torch.Tensor) -> "Evaluation":
    """The evaluation that a run's settings ask for, on text (bytes,) uint8 that is not trained on."""
    sentences = write_sentences(NOUNS, held_out.device)
    return Evaluation(held_out, sentences, settings.evaluation_sequences, precision(settings, held_out.device))


@dataclass(frozen=True)
class Evaluation:
    """What to measure with.

    Attributes:
        text: (bytes,) uint8, unseen in training.
        sentences: of the tasks.
        sequences: of each task and length.
        precision: context under which the model runs.
        seed: the same questions every time.
    """

    text: torch.Tensor
    sentences: Sentences
    sequences: int
    precision: AbstractContextManager[object]
    seed: int = 1

    def accuracy(self, model: nn.Module, task: str, length: int) -> float:
        """Share of sequences in which all digits of the last answer are predicted.

        One pass with the right digits given. All of them are most likely in their places exactly if greedy decoding
        writes them.
        """
        mixture = mix_tasks({task: 1.0}, self.text.device)
        generator = self._generator()
        right = []
        for count in self._portions(length):
            batch = make_batch(self.text, self.sentences, mixture, count, length, generator)
            with torch.no_grad(), self.precision:
                guesses = model(batch.tokens[:, :-1]).argmax(-1)
            # The last sentence ends the sequence: its digits and a newline.
            digits = slice(-1 - DIGITS, -1)
            right.append((guesses[:, digits] == batch.tokens[:, 1:][:, digits]).all(1))
        return torch.cat(right).float().mean().item()

    def text_loss(self, model: nn.Module, length: int) -> float:
        """Mean loss of a byte of unseen text, in nats."""
        generator = self._generator()
        losses = []
        for count in self._portions(length):
            tokens = windows(self.text, count, length + 1, generator)
            with torch.no_grad(), self.precision:
                logits = model(tokens[:, :-1]).float()
            losses.append(F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(1))
        return torch.cat(losses).mean().item()

    def all(self, model: nn.Module, length: int) -> dict[str, float]:
        """The accuracy of every task and the text loss at one length."""
        model.eval()
        # Compiled code is for the shapes of training.
        with torch.compiler.set_stance("force_eager"):
            results = {task: self.accuracy(model, task, length) for task in MEASURED}
            results["text_loss"] = self.text_loss(model, length)
        model.train()
        return results

    def _generator(self) -> torch.Generator:
        return torch.Generator(self.text.device).manual_seed(self.seed)

    def _portions(self, length: int) -> list[int]:
        most = max(1, min(self.sequences, TOKENS_AT_ONCE // length))
        return [min(most, self.sequences - done) for done in range(0, self.sequences, most)]


def final_evaluation(model: nn.Module, settings: Settings, held_out: torch.Tensor) -> dict[str, dict[str, float]]:
    """All measures at the training length and beyond it, by the plain model, that is without LongMamba.

    Returns:
        Length in bytes -> measures. For a hybrid also "window": those at the training length when its attention sees
        the last ATTENTION_WINDOW tokens only. Where they stay what they were, it is not attention that remembers.
    """
    evaluation = evaluation_of(settings, held_out)
    results = {}
    for factor in LONGER:
        if factor * settings.length < len(held_out):
            results[str(factor * settings.length)] = evaluation.all(model, factor * settings.length)
    if settings.family == "zamba2":
        model.window = ATTENTION_WINDOW
        results["window"] = evaluation.all(model, settings.length)
        model.window = None
    return results
