"""Where a table comes from, and the ranges of its numbers."""

from dataclasses import dataclass

FORMAT_VERSION = 1

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
}


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
        num_sequences: calibration sequences averaged.
        seed: seed that chose the sequences.
        tool_version: version of the program that calibrated.
        method: "paper", the rule of arXiv 2504.16053 section 4.
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
    method: str = "paper"
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
        check_train_length(self.train_length, "TableMetadata")
        check_clamp_percent(self.clamp_percent, "TableMetadata")
        check_min_retention(self.min_retention, "TableMetadata")
        if self.num_sequences < 1:
            raise ValueError(
                f"TableMetadata.num_sequences must be at least 1, got {self.num_sequences}; "
                "pass the number of calibrated sequences"
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
