"""Where a table comes from."""

from dataclasses import dataclass

from .ranges import check_range

FORMAT_VERSION = 3

UNCLAMPED = "unclamped"
PAPER = "paper"
METHODS = (UNCLAMPED, PAPER)

# The theta of a table where none is given: the paper's for its method, for the other docs/methods.md.
DEFAULT_MIN_RETENTION = {UNCLAMPED: 0.05, PAPER: 0.01}

_TEXTS = ("model_id", "weights_fingerprint", "corpus", "tool_version", "method")
_RANGED = ("train_length", "clamp_percent", "min_retention", "num_sequences", "seed", "budget", "unfiltered_end")


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
        method: "paper", the rule of arXiv 2504.16053 section 4; "unclamped", the same without its clamp, in whose mean
            no sequence counts as more than twice the median; or another name for thresholds from elsewhere.
        budget: of the method "unclamped": what a channel may keep, as a factor of its sum of dt over the training
            length.
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
    budget: float = 1.0
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
        for name in _RANGED:
            check_range(name, getattr(self, name), "TableMetadata")
        for name in ("clamp_percent", "min_retention", "budget"):
            # 5 and 5.0 must write the same bytes.
            object.__setattr__(self, name, float(getattr(self, name)))
        if self.method == UNCLAMPED and self.clamp_percent != 0:
            raise ValueError(
                f"TableMetadata: with the method {UNCLAMPED!r} clamp_percent must be 0, got {self.clamp_percent}; "
                f"with a clamp the method is {PAPER!r}"
            )
        if self.method != UNCLAMPED and self.budget != 1:
            raise ValueError(
                f"TableMetadata.budget must be 1 with the method {self.method!r}, got {self.budget}; only "
                f"{UNCLAMPED!r} has others"
            )
