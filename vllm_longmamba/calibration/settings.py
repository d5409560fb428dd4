"""How a table is made: what `longmamba calibrate` takes as options, and what follows from the method."""

from dataclasses import dataclass

from vllm_longmamba.architectures import is_mamba1
from vllm_longmamba.checkpoint.train_length import DEFAULT_MAX_MODEL_LEN
from vllm_longmamba.tables import (
    DEFAULT_COMBINE,
    DEFAULT_MIN_RETENTION,
    MEAN,
    METHODS,
    PAPER,
    UNCLAMPED,
    check_budget,
    check_combine,
    check_unfiltered_end,
    read_channel_budgets,
)


@dataclass(frozen=True)
class CalibrationSettings:
    """How a table is made.

    Attributes:
        num_sequences: calibration sequences, each of the training length; the paper takes 5.
        clamp_percent: share of the largest dt's that are clamped (the paper's C). By default 20 for Mamba-1 and 5 for
            Mamba-2 layers, the paper's choice for Mamba-1.4B and Mamba2-1.3B; 0 with the method "unclamped".
        min_retention: what the table proposes as retention above which a channel is global (the paper's theta). By
            default that of the method.
        train_length: the paper's L; by default what is known of the model.
        max_length: the longest prompt the table is made for, in tokens.
        seed: chooses the sequences.
        method: "paper"; "unclamped", the same without the clamp, and with the clipped mean over the sequences;
            or "closed-loop", whose thresholds come from sequences of the prompts' length. By default "unclamped", or
            "paper" where clamp_percent is given.
        combine: how the thresholds of several sequences become one: "median", "min", "mean" or "clipped", see
            `combine_thresholds`. By default "clipped", in the closed loop "median"; the paper's method takes the mean.
        measure_to: the longest closed-loop sequences, in tokens; thresholds of longer prompts are extrapolated. By
            default max_length.
        budget: what a channel may keep, as a factor of its sum of dt over the training length; the paper's is 1.
        channel_budgets: channels with a budget of their own, "LAYER.CHANNEL=BUDGET" each; of the method "unclamped".
        unfiltered_end: as many of a prompt's last tokens are not filtered; serving may change it. 0 in the paper.

    Raises:
        ValueError: an unknown method or way to combine; a budget that is not above 0, or a channel's of another form;
            an unfiltered_end below 0; a clamp with "unclamped"; another way to combine than the mean, or a budget, with
            "paper"; channel_budgets with another method than "unclamped".
    """

    num_sequences: int = 5
    clamp_percent: float | None = None
    min_retention: float | None = None
    train_length: int | None = None
    max_length: int = DEFAULT_MAX_MODEL_LEN
    seed: int = 0
    method: str | None = None
    combine: str | None = None
    measure_to: int | None = None
    budget: float = 1.0
    unfiltered_end: int = 0
    channel_budgets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_budget(self.budget, "CalibrationSettings")
        check_unfiltered_end(self.unfiltered_end, "CalibrationSettings")
        if self.method is None:
            object.__setattr__(self, "method", PAPER if self.clamp_percent else UNCLAMPED)
        if self.method not in METHODS:
            raise ValueError(f"CalibrationSettings: method must be one of {', '.join(METHODS)}, got {self.method!r}")
        if self.method == UNCLAMPED and self.clamp_percent:
            raise ValueError(
                f"CalibrationSettings: the method {UNCLAMPED} has no clamp, got clamp_percent {self.clamp_percent}; "
                f"leave it out, or take the method {PAPER}"
            )
        if self.combine is None:
            object.__setattr__(self, "combine", DEFAULT_COMBINE[self.method])
        check_combine(self.way_to_combine, "CalibrationSettings")
        if self.method == PAPER and self.combine != MEAN:
            raise ValueError(
                f"CalibrationSettings: the method {PAPER} takes the {MEAN} over the sequences, got combine "
                f"{self.combine!r}; leave it out, or take the method {UNCLAMPED}"
            )
        read_channel_budgets(self.channel_budgets)
        if self.channel_budgets and self.method != UNCLAMPED:
            raise ValueError(
                f"CalibrationSettings: channel_budgets are of the method {UNCLAMPED}, got them with {self.method}; "
                "leave them out"
            )
        if self.method == PAPER and self.budget != 1:
            raise ValueError(
                f"CalibrationSettings: the method {PAPER} has no budget but that of the training length, got "
                f"{self.budget}; leave it out, or take the method {UNCLAMPED}"
            )

    @property
    def theta(self) -> float:
        """`min_retention`, or the method's where none is given."""
        assert self.method is not None
        return DEFAULT_MIN_RETENTION[self.method] if self.min_retention is None else self.min_retention

    @property
    def way_to_combine(self) -> str:
        """`combine`, or the method's where none is given."""
        assert self.combine is not None
        return self.combine

    def clamp(self, architecture: str) -> float:
        """`clamp_percent`, or the method's for models of an architecture where none is given."""
        if self.clamp_percent is not None:
            return self.clamp_percent
        return 0.0 if self.method == UNCLAMPED else default_clamp_percent(architecture)


def default_clamp_percent(architecture: str) -> float:
    """The clamp of the paper for Mamba-1.4B and for Mamba2-1.3B (20 and 5 per cent), by the kind of the layers."""
    return 20.0 if is_mamba1(architecture) else 5.0
