"""Where a table comes from, and the ranges of its numbers."""

from dataclasses import asdict, dataclass
from typing import Any

FORMAT_VERSION = 1

UNCLAMPED = "unclamped"
PAPER = "paper"
CLOSED_LOOP = "closed-loop"
METHODS = (UNCLAMPED, PAPER, CLOSED_LOOP)

# The theta of a table where none is given: the paper's for its method, for the others docs/closed_loop.md.
DEFAULT_MIN_RETENTION = {UNCLAMPED: 0.05, PAPER: 0.01, CLOSED_LOOP: 0.05}

# How the thresholds of several sequences become one. "clipped": the mean, where a sequence's counts at most as twice
# their median.
MEDIAN = "median"
MEAN = "mean"
CLIPPED = "clipped"
COMBINE = (MEDIAN, "min", MEAN, CLIPPED)

# The one of a method where none is given. Without a clamp a threshold hangs on the few largest dt's of a sequence, and
# the plain mean on the sequence with the largest ones: docs/closed_loop.md.
DEFAULT_COMBINE = {UNCLAMPED: CLIPPED, PAPER: MEAN, CLOSED_LOOP: MEDIAN}

# Of a prompt: numbers of tokens are added up in int32.
MOST_TOKENS = 1 << 30

_METADATA_TYPES: dict[str, type] = {
    "format_version": int,
    "model_id": str,
    "weights_fingerprint": str,
    "train_length": int,
    "corpus": str,
    "clamp_percent": float,
    "min_retention": float,
    "num_sequences": int,
    "seed": int,
    "tool_version": str,
    "method": str,
    "combine": str,
}

# Fields that tables are older than, and what such tables mean. A field of this value is not written.
OPTIONAL: dict[str, Any] = {
    "combine": MEAN,
    "closed_loop": None,
    "unfiltered": (),
    "budget": 1.0,
    "channel_budgets": (),
    "unfiltered_end": 0,
}
_REQUIRED = object()


@dataclass(frozen=True, kw_only=True)
class ClosedLoop:
    """How a closed-loop table was measured.

    Attributes:
        combine: how the thresholds of several sequences became one, see COMBINE.
        lengths: the prompt lengths that were measured, in tokens, ascending.
        text_tokens: tokens of the calibration text; longer sequences repeat it.
        budget: what a channel may keep, as a factor of its sum of dt over the training length.

    Raises:
        ValueError: a field of another type, or outside its range.
    """

    combine: str
    lengths: tuple[int, ...]
    text_tokens: int
    budget: float = 1.0

    def __post_init__(self) -> None:
        check_combine(self.combine, "ClosedLoop")
        numbers = (*self.lengths, self.text_tokens)
        if any(isinstance(number, bool) or not isinstance(number, int) or number < 1 for number in numbers):
            raise ValueError(f"ClosedLoop: lengths and text_tokens must be integers above 0, got {numbers}")
        object.__setattr__(self, "lengths", tuple(self.lengths))
        check_budget(self.budget, "ClosedLoop")
        object.__setattr__(self, "budget", float(self.budget))
        if not self.lengths or list(self.lengths) != sorted(set(self.lengths)):
            raise ValueError(f"ClosedLoop.lengths must ascend, and be at least one, got {list(self.lengths)}")


@dataclass(frozen=True, kw_only=True)
class TableMetadata:
    """Where a table comes from.

    Attributes:
        model_id: name or path of the calibrated model.
        weights_fingerprint: fingerprint of its weights.
        train_length: L, tokens the model was trained on.
        corpus: the calibration text, in words.
        clamp_percent: C, per cent of the calibration dt's that exceed the clamp, 0 <= C < 100.
        min_retention: the default theta, 0 <= theta <= 1; a channel of a larger retention is global.
        num_sequences: calibration sequences.
        seed: seed that chose the sequences.
        tool_version: version of the program that calibrated.
        method: "paper", the rule of arXiv 2504.16053 section 4; "unclamped", the same without its clamp;
            "closed-loop", see closed_loop.py; or another name for thresholds from elsewhere.
        combine: how the thresholds of the sequences became one, see COMBINE; "mean" except with "unclamped", and in the
            tables of that method that do not tell. A closed loop has its own in `closed_loop`.
        closed_loop: how a closed-loop table was measured, None for others.
        unfiltered: what is not filtered though it is global, "LAYER" or "LAYER.CHANNEL" each; see unfiltered.py.
        budget: of the method "unclamped": what a channel may keep, as a factor of its sum of dt over the training
            length. A closed loop has its own in `closed_loop`.
        channel_budgets: channels with a budget of their own, "LAYER.CHANNEL=BUDGET" each; see channel_budgets.py.
        unfiltered_end: as many of a prompt's last tokens are not filtered.
        format_version: version of the file format.

    Raises:
        ValueError: a field of another type, or outside its range.
    """

    model_id: str
    weights_fingerprint: str
    train_length: int
    corpus: str
    clamp_percent: float
    min_retention: float
    num_sequences: int
    seed: int
    tool_version: str
    method: str = PAPER
    combine: str = MEAN
    closed_loop: ClosedLoop | None = None
    unfiltered: tuple[str, ...] = ()
    budget: float = 1.0
    channel_budgets: tuple[str, ...] = ()
    unfiltered_end: int = 0
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        for name, expected in _METADATA_TYPES.items():
            value = getattr(self, name)
            allowed = (int, float) if expected is float else expected
            if isinstance(value, bool) or not isinstance(value, allowed):
                raise ValueError(
                    f"TableMetadata.{name} must be {expected.__name__}, got {value!r}; pass a {expected.__name__}"
                )
            # 5 and 5.0 must write the same bytes.
            object.__setattr__(self, name, expected(value))
        if self.format_version != FORMAT_VERSION:
            raise ValueError(
                f"TableMetadata.format_version must be {FORMAT_VERSION}, got {self.format_version}; "
                "leave it out to get this release's"
            )
        if not all(isinstance(name, str) for name in self.unfiltered):
            raise ValueError(f"TableMetadata.unfiltered must be names such as '7' or '7.2', got {self.unfiltered!r}")
        object.__setattr__(self, "unfiltered", tuple(self.unfiltered))
        if (self.method == CLOSED_LOOP) != isinstance(self.closed_loop, ClosedLoop):
            raise ValueError(
                f"TableMetadata.closed_loop must be given with the method {CLOSED_LOOP!r} and no other, got "
                f"{self.closed_loop!r} with {self.method!r}; pass how the thresholds were measured"
            )
        if self.method == UNCLAMPED and self.clamp_percent != 0:
            raise ValueError(
                f"TableMetadata: with the method {UNCLAMPED!r} clamp_percent must be 0, got {self.clamp_percent}; "
                f"with a clamp the method is {PAPER!r}"
            )
        check_unfiltered_end(self.unfiltered_end, "TableMetadata")
        check_budget(self.budget, "TableMetadata")
        object.__setattr__(self, "budget", float(self.budget))
        object.__setattr__(self, "channel_budgets", tuple(self.channel_budgets))
        if not all(isinstance(name, str) for name in self.channel_budgets):
            raise ValueError(
                f"TableMetadata.channel_budgets must be names such as '3.2=4', got {self.channel_budgets!r}"
            )
        for name, usual in (("budget", 1), ("channel_budgets", ())):
            given = getattr(self, name)
            if given != usual and self.method != UNCLAMPED:
                raise ValueError(
                    f"TableMetadata.{name} must be {usual or 'none'} with the method {self.method!r}, got {given}; "
                    f"only {UNCLAMPED!r} has others"
                )
        check_combine(self.combine, "TableMetadata")
        if self.combine != MEAN and self.method != UNCLAMPED:
            raise ValueError(
                f"TableMetadata.combine must be {MEAN!r} with the method {self.method!r}, got {self.combine!r}; only "
                f"{UNCLAMPED!r} has others"
            )
        check_train_length(self.train_length, "TableMetadata")
        check_clamp_percent(self.clamp_percent, "TableMetadata")
        check_min_retention(self.min_retention, "TableMetadata")
        if self.num_sequences < 1:
            raise ValueError(
                f"TableMetadata.num_sequences must be at least 1, got {self.num_sequences}; "
                "pass the number of calibrated sequences"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, from which `from_dict` makes the same; those that say nothing new are left out."""
        values = asdict(self)
        return {name: value for name, value in values.items() if OPTIONAL.get(name, _REQUIRED) != value}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TableMetadata":
        """What `to_dict` was made of, also after JSON.

        Raises:
            ValueError: a missing or unknown field, one of another type, or one outside its range.
        """
        try:
            given = values.get("closed_loop")
            return cls(**{**values, "closed_loop": None if given is None else ClosedLoop(**given)})
        except TypeError as error:
            raise ValueError(f"TableMetadata: {error}") from error


def check_combine(combine: str, place: str) -> None:
    """Raises ValueError unless combine is one of COMBINE."""
    if combine not in COMBINE:
        raise ValueError(f"{place}: combine must be one of {', '.join(COMBINE)}, got {combine!r}")


def check_budget(budget: float, place: str) -> None:
    """Raises ValueError unless budget is a number above 0."""
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not 0 < budget < float("inf"):
        raise ValueError(
            f"{place}: budget must be a factor above 0, got {budget!r}; 1 keeps what the training length has"
        )


def check_unfiltered_end(unfiltered_end: int, place: str) -> None:
    """Raises ValueError unless unfiltered_end is a number of tokens that a prompt can have."""
    is_number = isinstance(unfiltered_end, int) and not isinstance(unfiltered_end, bool)
    if not is_number or not 0 <= unfiltered_end <= MOST_TOKENS:
        raise ValueError(
            f"{place}: unfiltered_end must be a number of tokens, 0 to {MOST_TOKENS}, got {unfiltered_end!r}; 0 "
            "filters all of a prompt"
        )


def check_train_length(train_length: int, place: str) -> None:
    """Raises ValueError unless there are two tokens to interpolate between."""
    if train_length < 2:
        raise ValueError(
            f"{place}: train_length must be at least 2 tokens, got {train_length}; pass the model's training length"
        )


def check_clamp_percent(clamp_percent: float, place: str) -> None:
    """Raises ValueError unless 0 <= clamp_percent < 100."""
    if not 0 <= clamp_percent < 100:
        raise ValueError(f"{place}: clamp_percent must lie in [0, 100), got {clamp_percent}; the paper takes 5 or 20")


def check_min_retention(min_retention: float, place: str) -> None:
    """Raises ValueError unless 0 <= min_retention <= 1."""
    if not 0 <= min_retention <= 1:
        raise ValueError(
            f"{place}: min_retention must lie in [0, 1], got {min_retention}; the paper searches 1e-40 to 1e-1"
        )
