"""All settings of a training run in one dataclass, and their values for each family."""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

FAMILIES = ("mamba1", "mamba2", "zamba2")
EXPAND = 2  # channels of a mixer per channel of the model
VOCABULARY = 264  # 256 bytes, end of text, padding to a multiple of 8
END_OF_TEXT = 256
CHECKPOINT_BYTES = 8_000_000  # the largest weight file that the repository takes


@dataclass(frozen=True)
class Stage:
    """A part of the training with its own mixture of tasks.

    Attributes:
        until: share of the training at which it ends, 0 to 1.
        shares: task (see tasks.py) -> share of the sequences.
        answer_weight: the loss is that of text + answer_weight times that of answers' digits (means of each).
    """

    until: float
    shares: dict[str, float]
    answer_weight: float


def default_stages() -> tuple[Stage, ...]:
    """Retrieval first, from many answers a sequence; then the tasks as they will be asked; then more plain text."""
    return (
        Stage(0.4, {"recall": 0.7, "passkey": 0.1, "needles": 0.1, "text": 0.1}, 1.0),
        Stage(0.8, {"recall": 0.2, "passkey": 0.25, "needles": 0.35, "text": 0.2}, 1.0),
        Stage(1.0, {"recall": 0.05, "passkey": 0.2, "needles": 0.35, "text": 0.4}, 0.5),
    )


@dataclass(frozen=True)
class Settings:
    """Of one run.

    Attributes:
        family: mamba1, mamba2 or zamba2.
        d_model, n_layer, d_state, headdim, chunk_size: of the model; headdim and chunk_size of Mamba-2 mixers only.
        dt_min, dt_max: initial time steps (softplus of their bias), uniform in the logarithm.
        a_min, a_max: initial decays -A of Mamba-2's heads, uniform. Mamba-1's are 1 to d_state.
        hybrid_layers, attention_heads, mlp_width, adapter_rank, rope_theta: of the shared transformer of zamba2.
        far_sequences: of zamba2: in training, attention also sees the keys of so many other sequences of the batch, as
            if they stood far before; 0: its own only. The Mamba layers are not told of them.
        far_length: with far_sequences, as many bytes as the longest text for which these keys stand.
        length: bytes of a sequence, the training length L.
        batch: sequences a step.
        steps: at most so many.
        minutes: at most so many of wall clock from the start of the program, compilation included; the end of the
            learning-rate schedule is whichever of the two comes first. None: no limit.
        reserve_seconds: of these minutes, kept for the last evaluation and the export.
        peak_lr, final_lr_share, warmup_steps: linear warm-up, then a cosine down to peak_lr * final_lr_share.
        optimizer: adamw, or muon (for the matrices of the blocks; adamw for all else).
        weight_decay: of matrices; vectors, embeddings and A have none.
        clip: largest norm of the gradient.
        stages: mixtures of tasks.
        distractors: of each sequence at most so many numbers that are never asked for stand in the text.
        foreign_words: share of these that are words of other scripts instead.
        evaluations: how many in a run, besides the last.
        evaluation_sequences: of each task.
        evaluated_lengths: at which an evaluation in a run measures, in training lengths, ascending from 1.
        exports: shares of the training, ascending; the model is also written at the first evaluation behind each.
        bf16: matrix products in bfloat16.
        compile: torch.compile.
        start: folder of a checkpoint of the same shape, as `--out` has it, to go on from; empty: untrained weights.
        retention_ceiling: over a sequence, a Mamba-2 head should keep at most this share of its state (mixers.py,
            `excess_retention`); 1: any share.
        ceiling_layers: the layers of these heads; empty: all. In the first layer dt depends on the token alone, so that
            its heads cannot tell a number to remember from another one.
        memory_heads: (layer, head) of heads with a ceiling of their own.
        memory_ceiling: that of memory_heads.
        retention_weight: of the excess in the loss.
        write_cost: in the loss, of what Mamba-2's heads with a long memory forget over a sequence (mixers.py,
            `forgetting_of_memories`).
        start_ceiling: before the training, A of each Mamba-2 head is raised until the head keeps at most this share of
            its state over a sequence of text (decays.py); 1: A as it is.
        fixed_decays: what decides on the forgetting of Mamba-2's heads, A and the weights of dt, is not trained.
        seed: of weights and data. With `minutes`, runs differ all the same, by what the clock says.
    """

    family: str
    d_model: int = 256
    n_layer: int = 8
    d_state: int = 128
    headdim: int = 32
    chunk_size: int = 64
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    a_min: float = 1.0
    a_max: float = 16.0
    hybrid_layers: tuple[int, ...] = ()
    attention_heads: int = 8
    mlp_width: int = 256
    adapter_rank: int = 8
    rope_theta: float = 10.0
    far_sequences: int = 0
    far_length: int = 32_768
    length: int = 512
    batch: int = 64
    steps: int = 40_000
    minutes: float | None = None
    reserve_seconds: float = 20.0
    peak_lr: float = 2e-3
    final_lr_share: float = 0.02
    warmup_steps: int = 200
    optimizer: str = "adamw"
    weight_decay: float = 0.1
    clip: float = 1.0
    stages: tuple[Stage, ...] = field(default_factory=default_stages)
    distractors: int = 0
    foreign_words: float = 0.0
    evaluations: int = 20
    evaluation_sequences: int = 256
    evaluated_lengths: tuple[int, ...] = (1,)
    exports: tuple[float, ...] = ()
    bf16: bool = True
    compile: bool = True
    start: str = ""
    retention_ceiling: float = 1.0
    ceiling_layers: tuple[int, ...] = ()
    memory_heads: tuple[tuple[int, int], ...] = ()
    memory_ceiling: float = 1.0
    retention_weight: float = 3.0
    write_cost: float = 0.0
    start_ceiling: float = 1.0
    fixed_decays: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"settings: family must be one of {FAMILIES}, got {self.family!r}")
        if self.optimizer not in ("adamw", "muon"):
            raise ValueError(f"settings: optimizer must be adamw or muon, got {self.optimizer!r}")
        if (self.family == "zamba2") != bool(self.hybrid_layers):
            raise ValueError(f"settings: zamba2, and no other family, needs hybrid_layers, got {self.hybrid_layers}")
        if self.far_sequences and self.family != "zamba2":
            raise ValueError(f"settings: far_sequences are for zamba2's attention, leave them out for {self.family}")
        if not 0 <= self.far_sequences < self.batch:
            raise ValueError(
                f"settings: far_sequences must be others of a batch of {self.batch}, got {self.far_sequences}"
            )
        if self.far_length < self.length:
            raise ValueError(f"settings: far_length must be at least the length {self.length}, got {self.far_length}")
        for name in ("hybrid_layers", "ceiling_layers"):
            if any(not 0 <= layer < self.n_layer for layer in getattr(self, name)):
                raise ValueError(f"settings: {name} must lie below n_layer {self.n_layer}, got {getattr(self, name)}")
        if self.ceiling_layers and self.retention_ceiling == 1:
            raise ValueError("settings: ceiling_layers need a retention_ceiling below 1")
        for low, high in (("dt_min", "dt_max"), ("a_min", "a_max")):
            if not 0 < getattr(self, low) <= getattr(self, high):
                raise ValueError(
                    f"settings: 0 < {low} <= {high} must hold, got {getattr(self, low)} and {getattr(self, high)}"
                )
        for name in ("retention_ceiling", "memory_ceiling", "start_ceiling"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"settings: {name} must be above 0 and at most 1, got {getattr(self, name)}")
        if self.family == "mamba1":
            for name in ("retention_ceiling", "write_cost", "start_ceiling", "fixed_decays"):
                if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                    raise ValueError(f"settings: {name} is for Mamba-2's heads, leave it out for mamba1")
        if self.memory_heads and 1 in (self.retention_ceiling, self.memory_ceiling):
            raise ValueError("settings: memory_heads need a retention_ceiling and a memory_ceiling below 1")
        if any(not (0 <= layer < self.n_layer and 0 <= head < self.nheads) for layer, head in self.memory_heads):
            raise ValueError(
                f"settings: memory_heads must be of {self.n_layer} layers with {self.nheads} heads each, "
                f"got {self.memory_heads}"
            )
        if list(self.evaluated_lengths) != sorted({1, *self.evaluated_lengths}):
            raise ValueError(f"settings: evaluated_lengths must ascend from 1, got {self.evaluated_lengths}")
        if list(self.exports) != sorted(share for share in self.exports if 0 < share < 1):
            raise ValueError(f"settings: exports must ascend between 0 and 1, got {self.exports}")
        ends = [stage.until for stage in self.stages]
        if not ends or ends != sorted(ends) or ends[-1] < 1:
            raise ValueError(f"settings: stages must end in rising order, the last at 1, got {ends}")

    @property
    def nheads(self) -> int:
        """Heads of a Mamba-2 mixer."""
        return EXPAND * self.d_model // self.headdim

    def stage(self, progress: float) -> Stage:
        """The stage at a share of the training, 0 to 1."""
        return next((stage for stage in self.stages if progress < stage.until), self.stages[-1])

    def save(self, path: Path) -> None:
        """Writes them as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")


FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "mamba1": {"d_state": 16},
    "mamba2": {},
    "zamba2": {"n_layer": 6, "d_state": 64, "hybrid_layers": (2, 5)},
}


def family_settings(family: str, **changes: Any) -> Settings:
    """The reference model's settings of a family, with changes, which may be values as JSON has them.

    Raises:
        ValueError: an unknown family or a setting that is not allowed.
    """
    for name in ("hybrid_layers", "ceiling_layers", "evaluated_lengths", "exports"):
        if name in changes:
            changes[name] = tuple(changes[name])
    if "memory_heads" in changes:
        changes["memory_heads"] = tuple((layer, head) for layer, head in changes["memory_heads"])
    if "stages" in changes:
        changes["stages"] = tuple(stage if isinstance(stage, Stage) else Stage(**stage) for stage in changes["stages"])
    return replace(Settings(family, **FAMILY_DEFAULTS.get(family, {})), **changes)


def read_settings(path: Path) -> dict[str, Any]:
    """Changes of settings from a JSON file such as `Settings.save` writes, for `family_settings`."""
    changes: dict[str, Any] = json.loads(path.read_text())
    return changes
