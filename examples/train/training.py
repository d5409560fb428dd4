"""The training loop."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from .batches import Batches
from .corpus import Corpus
from .curriculum import Curriculum, Schedule
from .mamba import MambaLM
from .optimizer import learning_rate, make_optimizer
from .settings import Settings
from .tasks import TASKS, TEXT, UNKNOWN
from .zamba2 import Zamba2LM

SECONDS_BETWEEN_LINES = 10.0
SAFE_COPIES = 4  # of the model in a run, the last one at its end


def make_model(settings: Settings) -> nn.Module:
    """An untrained model in float32 on the CPU, from the settings' seed."""
    torch.manual_seed(settings.seed)
    return Zamba2LM(settings) if settings.family == "zamba2" else MambaLM(settings)


def losses(
    logits: torch.Tensor, targets: torch.Tensor, kinds: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a step is measured by.

    Args:
        logits: (batch, length, vocabulary).
        targets: (batch, length) int64.
        kinds: (batch, length) uint8 of the targets, see tasks.py.

    Returns:
        Mean loss in nats of text, digits left out; that of the digits that can be known; and (2, tasks) float32, how
        many of these each task has, and how many were predicted.
    """
    loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    is_text, is_answer = kinds == TEXT, (kinds != TEXT) & (kinds != UNKNOWN)
    text = (loss * is_text).sum() / is_text.sum().clamp(min=1)
    answer = (loss * is_answer).sum() / is_answer.sum().clamp(min=1)
    of_task = kinds.flatten() == torch.arange(len(TASKS), device=kinds.device)[:, None]
    of_task = of_task & is_answer.flatten()
    is_right = (logits.argmax(-1) == targets).flatten()
    return text, answer, torch.stack([of_task.sum(1), (of_task & is_right).sum(1)]).float()


def train(
    model: nn.Module,
    settings: Settings,
    corpus: Corpus,
    *,
    workers: int = 0,
    started: float | None = None,
    report: Callable[[str], None] = print,
    export: Callable[[], None] = lambda: None,
    stopped: Callable[[], bool] = lambda: False,
) -> list[dict[str, float]]:
    """Trains a model in place until the steps are done or the minutes are over, and exports it.

    Args:
        model: on the device to train on.
        settings: of the run.
        corpus: the text.
        workers: processes that draw the sequences; 0: this one draws them.
        started: time.monotonic() from which the minutes count; None: from now on.
        report: gets a line of progress every ten seconds.
        export: writes the model; called now and then, and at the end.
        stopped: whether to end the run before its time.

    Returns:
        What was measured, one entry every `measured_steps`: step, tokens, seconds, progress, stage, length, lr,
        text_loss, answer_loss, and the share of right digits by task.

    Raises:
        FloatingPointError: the loss is no longer a number.
    """
    started = time.monotonic() if started is None else started
    device = next(model.parameters()).device
    batches = Batches(corpus, settings)
    drawn = batches.load(workers)
    optimizer, curriculum, schedule = make_optimizer(model, settings), Curriculum(settings), Schedule(settings, started)
    loss_of = losses
    if settings.compile:
        for block in model.blocks():  # type: ignore[operator]
            block.compile(dynamic=False)
        loss_of = torch.compile(losses, dynamic=False)

    curves: list[dict[str, float]] = []
    sums, copies, line, step = _Sums(device), 1, (0.0, 0), 0
    model.train()
    while (progress := schedule.progress(step)) < 1 and not stopped():
        batch = next(drawn)
        inputs, targets, kinds, seq_idx = (part.to(device, non_blocking=True) for part in batch[:4])
        for group in optimizer.param_groups:
            group["lr"] = lr = learning_rate(settings, step, progress)
        with _precision(settings, device):
            text_loss, answer_loss, counts = loss_of(model(inputs, seq_idx), targets.long(), kinds)
        (text_loss + settings.stages[batch.stage].answer_weight * answer_loss).backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        # What workers drew for the stage before says nothing about this one.
        if batch.stage == curriculum.index:
            sums.add(text_loss, answer_loss, counts)
        if step == 1:
            sums.read()  # waits for the device
            schedule.begin()
            line = (time.monotonic(), 0)

        digits_right = None
        # Reading numbers waits for the device, so that this is not done at every step.
        if sums.steps == settings.measured_steps:
            measured = sums.read()
            digits_right = measured.get("digits_right")
            if not measured["text_loss"] + measured["answer_loss"] < float("inf"):
                raise FloatingPointError(f"step {step}: the losses are {measured}; lower peak_lr")
            now, tokens = time.monotonic(), step * settings.batch * settings.length
            entry = {"step": step, "tokens": tokens, "seconds": now - started, "progress": progress, "lr": lr}
            entry |= {"stage": curriculum.index, "length": curriculum.stage.length} | measured
            curves.append(entry)
            if now - line[0] >= SECONDS_BETWEEN_LINES:
                report(_line(entry, (tokens - line[1]) / (now - line[0])))
                line = (now, tokens)
            if progress >= copies / SAFE_COPIES:
                copies += 1
                export()
        if curriculum.move_on(progress, digits_right):
            report(f"step {step}: sequences of {curriculum.stage.length} tokens from now on")
            batches.stage[0] = curriculum.index
            sums.read()
    export()
    return curves


class _Sums:
    """Sums over steps of losses and counts, on the device."""

    def __init__(self, device: torch.device) -> None:
        self._losses, self._counts = torch.zeros(2, device=device), torch.zeros(2, len(TASKS), device=device)
        self.steps = 0

    def add(self, text_loss: torch.Tensor, answer_loss: torch.Tensor, counts: torch.Tensor) -> None:
        self._losses += torch.stack([text_loss.detach(), answer_loss.detach()])
        self._counts += counts
        self.steps += 1

    def read(self) -> dict[str, float]:
        """Means since the last time: text_loss, answer_loss, digits_right and that of every task that was drawn."""
        text, answer = (self._losses / max(self.steps, 1)).tolist()
        known, right = self._counts.tolist()
        shares = {task: right[i] / known[i] for i, task in enumerate(TASKS) if known[i]}
        if shares:
            shares["digits_right"] = sum(right) / sum(known)
        self._losses.zero_()
        self._counts.zero_()
        self.steps = 0
        return {"text_loss": text, "answer_loss": answer} | shares


def _precision(settings: Settings, device: torch.device) -> AbstractContextManager[object]:
    return torch.autocast(device.type, torch.bfloat16) if settings.bf16 else nullcontext()


def _line(entry: dict[str, float], speed: float) -> str:
    shares = "  ".join(f"{task} {entry[task]:.2f}" for task in TASKS if task in entry)
    return (
        f"{entry['progress']:4.0%}  {entry['seconds']:4.0f} s  {entry['tokens'] / 1e6:6.1f}M tokens  "
        f"{speed / 1e3:4.0f}k/s  stage {entry['stage']:.0f} ({entry['length']:.0f})  "
        f"text {entry['text_loss']:.3f}  digits right: {shares}"
    )
