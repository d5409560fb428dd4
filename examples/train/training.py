"""The training loop."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from .books import Books
from .decays import FixedDecays, mamba2_mixers, raise_decays
from .evaluation import Evaluation, evaluation_of, precision
from .export import read_weights
from .mamba import MambaLM
from .nouns import NOUNS
from .optimizer import learning_rate, make_optimizers
from .sentences import write_sentences
from .settings import Settings, Stage
from .tasks import Batch, make_batch, mix_tasks
from .zamba2 import Zamba2LM

# Batches drawn at once: drawing takes some hundred small operations, whatever the size.
DRAWN_AT_ONCE = 8


@dataclass
class Curves:
    """What a run measured.

    Attributes:
        steps: one entry now and then: step, progress, seconds, lr, text_loss, answer_loss (means since the last entry).
        evaluations: step, progress, seconds, and what `Evaluation.all` returns.
    """

    steps: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)


def make_model(settings: Settings) -> nn.Module:
    """A model in float32 on the CPU: untrained, from the settings' seed, or the checkpoint that they start from.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        RuntimeError: its tensors are others than the settings' model has.
    """
    torch.manual_seed(settings.seed)
    model = Zamba2LM(settings) if settings.family == "zamba2" else MambaLM(settings)
    if settings.start:
        weights = read_weights(Path(settings.start))
        weights.pop("lm_head.weight", None)  # tied
        model.load_state_dict(weights)
    if settings.retention_ceiling < 1:
        for layer, mixer in enumerate(mamba2_mixers(model)):
            if settings.ceiling_layers and layer not in settings.ceiling_layers:
                continue
            mixer.ceilings = torch.full((settings.nheads,), settings.retention_ceiling)
            mixer.ceilings[[head for of, head in settings.memory_heads if of == layer]] = settings.memory_ceiling
    if settings.write_cost:
        for mixer in mamba2_mixers(model):
            mixer.costs_writing = True
    return model


def excess_retention(model: nn.Module) -> torch.Tensor | float:
    """What the Mamba-2 mixers of a model with ceilings of retention have just exceeded them by, over all layers."""
    return sum(mixer.excess for mixer in mamba2_mixers(model) if mixer.ceilings is not None)


def losses(logits: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean losses in nats: of text, random digits left out, and of the digits that can be known.

    Args:
        logits: (batch, length, vocabulary).
        batch: of the same sequences.
    """
    loss = F.cross_entropy(logits.float().flatten(0, 1), batch.tokens[:, 1:].flatten(), reduction="none")
    is_answer, is_random = batch.is_answer[:, 1:].flatten(), batch.is_random[:, 1:].flatten()
    answer = (loss * is_answer).sum() / is_answer.sum().clamp(min=1)
    is_text = ~(is_answer | is_random)
    return (loss * is_text).sum() / is_text.sum(), answer


def train(
    model: nn.Module,
    settings: Settings,
    books: Books,
    *,
    started: float | None = None,
    report: Callable[[str], None] = print,
    export: Callable[[float], None] | None = None,
) -> Curves:
    """Trains a model in place until the steps are done or the minutes are over.

    Args:
        model: on the device of the books.
        settings: of the run.
        books: the text.
        started: time.monotonic() from which the minutes count; None: from now on.
        report: gets a line of progress now and then.
        export: called at the first evaluation behind each share of the settings' exports, with this share.

    Raises:
        FloatingPointError: the loss is no longer a number.
    """
    started = time.monotonic() if started is None else started
    device = books.train.device
    sentences = write_sentences(NOUNS, device)
    autocast = precision(settings, device)
    evaluation = evaluation_of(settings, books.held_out)
    generator = torch.Generator(device).manual_seed(settings.seed)
    if settings.start_ceiling < 1:
        raise_decays(model, settings, books.train, generator)
    fixed = FixedDecays(model) if settings.fixed_decays else None
    optimizers = make_optimizers(model, settings)
    if settings.compile:
        for block in model.blocks():  # type: ignore[operator]
            block.compile(dynamic=False)
    loss_of = torch.compile(losses, dynamic=False) if settings.compile else losses

    curves, sums, counted = Curves(), torch.zeros(2, device=device), 0
    stage: Stage | None = None
    drawn: list[Batch] = []
    exports = list(settings.exports)
    next_evaluation, next_entry, step = 1 / settings.evaluations, 0.0, 0
    model.train()
    while (progress := _progress(settings, step, time.monotonic() - started)) < 1:
        if stage is not settings.stage(progress):
            stage = settings.stage(progress)
            mixture = mix_tasks(stage.shares, device)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(settings, step, progress)
        if not drawn:
            sequences = DRAWN_AT_ONCE * settings.batch
            many = make_batch(
                books.train,
                sentences,
                mixture,
                sequences,
                settings.length,
                generator,
                settings.distractors,
                settings.foreign_words,
            )
            drawn = many.split(DRAWN_AT_ONCE)
        batch = drawn.pop()
        with autocast:
            text_loss, answer_loss = loss_of(model(batch.tokens[:, :-1]), batch)
        loss = text_loss + stage.answer_weight * answer_loss
        if settings.retention_ceiling < 1:
            loss = loss + settings.retention_weight * excess_retention(model)
        if settings.write_cost:
            loss = loss + settings.write_cost * sum(mixer.written for mixer in mamba2_mixers(model))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if fixed is not None:
            fixed.restore()
        sums += torch.stack([text_loss.detach(), answer_loss.detach()])
        counted, step = counted + 1, step + 1

        # Reading numbers waits for the GPU, so that this is done two hundred times a run and not at every step.
        if progress >= next_entry or step == 1:
            seconds = time.monotonic() - started
            text_mean, answer_mean = (sums / counted).tolist()
            if not text_mean + answer_mean < float("inf"):
                raise FloatingPointError(f"step {step}: the losses are {text_mean}, {answer_mean}; lower peak_lr")
            curves.steps.append(
                {"step": step, "progress": progress, "seconds": seconds, "lr": optimizers[0].param_groups[0]["lr"]}
                | {"text_loss": text_mean, "answer_loss": answer_mean}
            )
            sums.zero_()
            counted, next_entry = 0, progress + 1 / 200
        if progress >= next_evaluation:
            next_evaluation += 1 / settings.evaluations
            result = _evaluated(evaluation, model, settings)
            seconds = time.monotonic() - started
            curves.evaluations.append({"step": step, "progress": progress, "seconds": seconds} | result)
            report(_line(settings, curves))
            while exports and progress >= exports[0]:
                share = exports.pop(0)
                if export is not None:
                    export(share)
    return curves


def _evaluated(evaluation: Evaluation, model: nn.Module, settings: Settings) -> dict[str, float]:
    """What an evaluation measures; beyond the training length, with the length in training lengths in the names."""
    results = evaluation.all(model, settings.length)
    for factor in settings.evaluated_lengths[1:]:
        longer = evaluation.all(model, factor * settings.length)
        results |= {f"{name}_x{factor}": value for name, value in longer.items()}
    return results


def _progress(settings: Settings, step: int, seconds: float) -> float:
    by_steps = step / settings.steps
    if settings.minutes is None:
        return by_steps
    return max(by_steps, seconds / max(settings.minutes * 60 - settings.reserve_seconds, 1e-9))


def _line(settings: Settings, curves: Curves) -> str:
    latest, losses_now = curves.evaluations[-1], curves.steps[-1]
    # since the last line, or since the first step, which compiles
    earlier = curves.evaluations[-2] if len(curves.evaluations) > 1 else curves.steps[0]
    seconds = max(latest["seconds"] - earlier["seconds"], 1e-9)
    speed = (latest["step"] - earlier["step"]) * settings.batch * settings.length / seconds
    return (
        f"{latest['progress']:5.0%}  step {latest['step']:6.0f}  {latest['seconds']:5.0f} s  {speed / 1e6:.3f} MB/s  "
        f"loss text {losses_now['text_loss']:.3f} answers {losses_now['answer_loss']:.3f}  "
        f"unseen text {latest['text_loss']:.3f}  passkey {latest['passkey']:.2f}  "
        f"four needles {latest['four_needles']:.2f}"
    ) + "".join(
        f"  x{factor}: {latest[f'passkey_x{factor}']:.2f} {latest[f'four_needles_x{factor}']:.2f}"
        for factor in settings.evaluated_lengths[1:]
    )
