"""All settings of a training run in one dataclass, and their values for each family."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .tasks import TASKS

FAMILIES = ("mamba1", "mamba2", "zamba2")
EXPAND = 2  # channels of a mixer per channel of the model


@dataclass(frozen=True)
class Stage:
    """A part of the training with its own length of sequences and mixture of tasks.

    Attributes:
        length: tokens of a sequence; divides the training length.
        shares: task (see tasks.py) -> share of the sequences.
        answer_weight: the loss is that of text + answer_weight times that of answers' digits (means of each).
        until: share of the training at which it ends at the latest, 0 to 1.
        digits_right: it ends before, as soon as this share of the digits that can be known is predicted.
    """

    length: int
    shares: dict[str, float]
    answer_weight: float
    until: float
    digits_right: float = 0.9


def default_stages() -> tuple[Stage, ...]:
    """Retrieval first, from many answers in short sequences; then longer ones, the tasks as asked later, and text."""

    def shares(asked: float, recall: float) -> dict[str, float]:
        tasks = dict.fromkeys(("passkey", "needles", "ruler"), asked) | {"recall": recall}
        return tasks | {"text": round(1 - sum(tasks.values()), 6)}

    return (
        Stage(256, {"recall": 0.85, "text": 0.15}, 2.0, 0.4),
        Stage(512, shares(0.15, 0.35), 1.0, 0.55),
        Stage(1024, shares(0.2, 0.2), 0.6, 0.7),
        Stage(2048, shares(0.22, 0.1), 0.6, 0.85, 0.99),
        Stage(2048, shares(0.18, 0.05), 0.4, 1.0),
    )


@dataclass(frozen=True)
class Settings:
    """Of one run.

    Attributes:
        family: mamba1, mamba2 or zamba2.
        vocabulary: tokens of the tokenizer.
        d_model, n_layer, d_state, headdim: of the model; headdim of Mamba-2 mixers only.
        hybrid_layers, attention_heads, mlp_width, adapter_rank, rope_theta: of the shared transformer of zamba2.
        attention_length: tokens over which this attention runs, several sequences one after another.
        length: the training length L, in tokens. Shorter sequences of a stage stand side by side in rows of it.
        batch: rows a step.
        steps: at most so many; None: no limit.
        minutes: at most so many of wall clock from the start of the program, compilation and export included. The
            schedule ends at whichever of the two comes first.
        reserve_seconds: of these minutes, kept for the export.
        peak_lr, final_lr_share, warmup_steps: linear warm-up, then a cosine down to peak_lr * final_lr_share.
        weight_decay: of matrices; vectors, embeddings and A have none.
        clip: largest norm of the gradient.
        stages: one after another; the last goes on to the end.
        measured_steps: the share of right digits that ends a stage is that of so many steps.
        bf16: matrix products in bfloat16.
        compile: torch.compile.
        seed: of weights and data. With `minutes`, runs differ all the same, by what the clock says.
    """

    family: str
    vocabulary: int
    d_model: int = 512
    n_layer: int = 16
    d_state: int = 128
    headdim: int = 64
    hybrid_layers: tuple[int, ...] = ()
    attention_heads: int = 8
    mlp_width: int = 1024
    adapter_rank: int = 8
    rope_theta: float = 10.0
    attention_length: int = 16_384
    length: int = 2048
    batch: int = 32
    steps: int | None = None
    minutes: float | None = None
    reserve_seconds: float = 12.0
    peak_lr: float = 2e-3
    final_lr_share: float = 0.03
    warmup_steps: int = 150
    weight_decay: float = 0.1
    clip: float = 1.0
    stages: tuple[Stage, ...] = field(default_factory=default_stages)
    measured_steps: int = 20
    bf16: bool = True
    compile: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"settings: family must be one of {FAMILIES}, got {self.family!r}")
        if self.steps is None and self.minutes is None:
            raise ValueError("settings: steps or minutes must be given")
        for name in ("steps", "minutes"):
            if (limit := getattr(self, name)) is not None and not limit > 0:
                raise ValueError(f"settings: {name} must be above 0, got {limit}")
        if (self.family == "zamba2") != bool(self.hybrid_layers):
            raise ValueError(f"settings: zamba2, and no other family, needs hybrid_layers, got {self.hybrid_layers}")
        if any(not 0 <= layer < self.n_layer for layer in self.hybrid_layers):
            raise ValueError(f"settings: hybrid_layers must lie below n_layer {self.n_layer}, got {self.hybrid_layers}")
        if self.family == "zamba2" and self.batch * self.length % self.attention_length:
            raise ValueError(
                f"settings: attention_length must divide the {self.batch * self.length} tokens of a step, "
                f"got {self.attention_length}"
            )
        ends = [stage.until for stage in self.stages]
        if not ends or ends != sorted(ends) or ends[-1] < 1:
            raise ValueError(f"settings: stages must end in rising order, the last at 1, got {ends}")
        for stage in self.stages:
            if self.length % stage.length:
                raise ValueError(f"settings: a stage's length must divide {self.length}, got {stage.length}")
            if set(stage.shares) - set(TASKS) or not sum(stage.shares.values()) > 0:
                raise ValueError(f"settings: shares of a stage must name some of {TASKS}, got {stage.shares}")

    @property
    def nheads(self) -> int:
        """Heads of a Mamba-2 mixer."""
        return EXPAND * self.d_model // self.headdim

    def save(self, path: Path) -> None:
        """Writes them as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")


FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "mamba1": {"d_state": 16},
    "mamba2": {},
    "zamba2": {"n_layer": 12, "hybrid_layers": (3, 8)},
}


def family_settings(family: str, vocabulary: int, **changes: Any) -> Settings:
    """The settings of a family, with changes, which may be values as JSON has them.

    Raises:
        ValueError: an unknown family or setting, or a value that is not allowed.
    """
    if unknown := set(changes) - set(Settings.__dataclass_fields__):
        raise ValueError(f"settings: unknown {sorted(unknown)}; there are {sorted(Settings.__dataclass_fields__)}")
    if "hybrid_layers" in changes:
        changes["hybrid_layers"] = tuple(changes["hybrid_layers"])
    if "stages" in changes:
        changes["stages"] = tuple(stage if isinstance(stage, Stage) else Stage(**stage) for stage in changes["stages"])
    # in one call, so that only the values that remain are checked
    return Settings(**{"family": family, "vocabulary": vocabulary} | FAMILY_DEFAULTS.get(family, {}) | changes)
