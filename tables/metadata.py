"""Where a table comes from."""

from dataclasses import asdict, dataclass
from typing import Any

from .ranges import MOST_TOKENS, check_range

FORMAT_VERSION = 2

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

_TEXTS = ("model_id", "weights_fingerprint", "corpus", "tool_version", "method")
_RANGED = ("train_length", "clamp_percent", "min_retention", "num_sequences", "seed", "budget", "unfiltered_end")


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
        check_range("text_tokens", self.text_tokens, "ClosedLoop")
        check_range("budget", self.budget, "ClosedLoop")
        # 5 and 5.0 must write the same bytes.
        object.__setattr__(self, "budget", float(self.budget))
        object.__setattr__(self, "lengths", tuple(self.lengths))
        numbers = [length for length in self.lengths if isinstance(length, int) and not isinstance(length, bool)]
        ascends = bool(numbers) and self.lengths == tuple(sorted(set(numbers)))
        if not ascends or not 1 <= numbers[0] <= numbers[-1] <= MOST_TOKENS:
            raise ValueError(
                f"ClosedLoop: lengths must be numbers of tokens, 1 to {MOST_TOKENS}, that ascend, got "
                f"{len(self.lengths)} that do not; take them from measured_lengths"
            )


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
        combine: how the thresholds of the sequences became one, see COMBINE; "mean" except with "unclamped". A closed
            loop has its own in `closed_loop`.
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
        for name in _TEXTS:
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"TableMetadata.{name} must be str, got {getattr(self, name)!r}; pass a str")
        if self.format_version != FORMAT_VERSION:
            raise ValueError(
                f"TableMetadata.format_version must be {FORMAT_VERSION}, got {self.format_version!r}; "
                "leave it out to get this release's"
            )
        check_combine(self.combine, "TableMetadata")
        for name in _RANGED:
            check_range(name, getattr(self, name), "TableMetadata")
        for name in ("clamp_percent", "min_retention", "budget"):
            # 5 and 5.0 must write the same bytes.
            object.__setattr__(self, name, float(getattr(self, name)))
        for name, example in (("unfiltered", "'7' or '7.2'"), ("channel_budgets", "'3.2=4'")):
            names = getattr(self, name)
            if not isinstance(names, (list, tuple)) or not all(isinstance(one, str) for one in names):
                raise ValueError(f"TableMetadata.{name} must be names such as {example}, got {names!r}")
            object.__setattr__(self, name, tuple(names))
        self._check_method()

    def _check_method(self) -> None:
        """Raises ValueError where a field says what the method does not have."""
        if (self.method == CLOSED_LOOP) != isinstance(self.closed_loop, ClosedLoop):
            raise ValueError(
                f"TableMetadata.closed_loop must be given with the method {CLOSED_LOOP!r} and no other, got "
                f"{self.closed_loop!r} with {self.method!r}; pass how the thresholds were measured"
            )
        if self.method == UNCLAMPED:
            if self.clamp_percent != 0:
                raise ValueError(
                    f"TableMetadata: with the method {UNCLAMPED!r} clamp_percent must be 0, got {self.clamp_percent}; "
                    f"with a clamp the method is {PAPER!r}"
                )
            return
        for name, usual, rule in (("budget", 1, "1"), ("channel_budgets", (), "none"), ("combine", MEAN, repr(MEAN))):
            given = getattr(self, name)
            if given != usual:
                raise ValueError(
                    f"TableMetadata.{name} must be {rule} with the method {self.method!r}, got {given!r}; only "
                    f"{UNCLAMPED!r} has others"
                )

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, from which `from_dict` makes the same."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TableMetadata":
        """Returns what `to_dict` was made of, also after JSON.

        Raises:
            ValueError: a missing or unknown field, one of another type, or one outside its range.
        """
        given = values.get("closed_loop")
        try:
            return cls(**{**values, "closed_loop": None if given is None else ClosedLoop(**given)})
        except TypeError as error:
            raise ValueError(f"TableMetadata: {error}") from error


def check_combine(combine: str, place: str) -> None:
    """Raises ValueError unless combine is one of COMBINE."""
    if combine not in COMBINE:
        raise ValueError(f"{place}: combine must be one of {', '.join(COMBINE)}, got {combine!r}")
