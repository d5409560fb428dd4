"""`python -m train.toy_recall FAMILY`: associative recall on a CPU in minutes, to show that the models learn.

A sequence states PAIRS pairs of a key and a value, and then gives every key once more, in another order, each followed
by its value. The loss and the accuracy are those of these values. No text, none of the tasks of the real training.
"""

import time
from typing import Annotated

import torch
import torch.nn.functional as F  # noqa: N812
import typer

from .optimizer import learning_rate, make_optimizers
from .settings import Settings, family_settings
from .training import make_model

KEYS = 16  # and as many values
PAIRS = 4
TOY = {"d_model": 64, "n_layer": 2, "d_state": 16, "headdim": 16, "chunk_size": 16, "batch": 32, "peak_lr": 4e-3}
ZAMBA2 = {"hybrid_layers": (1,), "attention_heads": 4, "mlp_width": 64}


def toy_settings(family: str, steps: int, seed: int) -> Settings:
    """A model of two layers."""
    changes = TOY | (ZAMBA2 if family == "zamba2" else {}) | ({"d_state": 8} if family == "mamba1" else {})
    return family_settings(family, **changes, steps=steps, warmup_steps=20, seed=seed, bf16=False, compile=False)


def recall_sequences(batch: int, generator: torch.Generator) -> torch.Tensor:
    """(batch, 4 * PAIRS) int64: PAIRS times key, value; then the same pairs in another order."""
    keys = torch.rand(batch, KEYS, generator=generator).argsort(1)[:, :PAIRS]
    values = torch.randint(KEYS, 2 * KEYS, (batch, PAIRS), generator=generator)
    order = torch.rand(batch, PAIRS, generator=generator).argsort(1)
    pairs = torch.stack([keys, values], 2)
    again = pairs.gather(1, order[..., None].expand(-1, -1, 2))
    return torch.cat([pairs, again], 1).flatten(1)


def train_recall(settings: Settings, print_every: int = 100) -> list[float]:
    """Trains a model and returns the accuracy on the values at every step, on sequences not seen before."""
    model, generator = make_model(settings), torch.Generator().manual_seed(settings.seed)
    optimizers, accuracies, started = make_optimizers(model, settings), [], time.monotonic()
    for step in range(settings.steps):
        tokens = recall_sequences(settings.batch, generator)
        # the values asked for: every second token of the second half
        asked = slice(2 * PAIRS, None, 2)
        logits = model(tokens[:, :-1])[:, asked]
        targets = tokens[:, 1:][:, asked]
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(settings, step, step / settings.steps)
            optimizer.step()
            optimizer.zero_grad()
        accuracies.append((logits.argmax(-1) == targets).float().mean().item())
        if step % print_every == 0 or step == settings.steps - 1:
            seconds = time.monotonic() - started
            print(f"step {step:5}  {seconds:4.0f} s  loss {loss.item():.3f}  right {accuracies[-1]:.2f}", flush=True)
    return accuracies


def main(
    family: Annotated[str, typer.Argument(help="mamba1, mamba2 or zamba2")],
    steps: Annotated[int, typer.Option(help="of 32 sequences")] = 1500,
    seed: Annotated[int, typer.Option(help="of weights and data")] = 0,
) -> None:
    """Learn associative recall, and print loss and accuracy on the way."""
    train_recall(toy_settings(family, steps, seed))


if __name__ == "__main__":
    typer.run(main)
