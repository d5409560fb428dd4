"""What a user can set: `--additional-config '{"longmamba": {...}}'`, as one typed object."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

KEY = "longmamba"

# Named again by tables/metadata.py, whose package loads torch.
CALIBRATION_METHODS = ("unclamped", "paper")

# As in tables/ranges.py.
_MOST_TOKENS = 1 << 30

_SWITCH = {"on": True, "off": False}


@dataclass(frozen=True)
class LongMambaOptions:
    """Options of a LongMamba engine.

    Attributes:
        table: path of the threshold table (a .safetensors file). By default it is looked for beside the weights, among
            the tables that come with the package, and in the user's cache.
        min_retention: retention above which a channel counts as global (the paper's theta), in (0, 1). By default the
            value that the table was made with.
        train_length: tokens of the sequences that the model was trained on (the paper's L). Needed where no table
            exists yet; a table carries its own, and a different value is an error.
        filter: False runs the plain model through the same engine, for comparison.
        filter_generated: generated tokens are filtered too, by the row of their prompt; for long generations. The paper
            filters prompts only.
        unfiltered_end: as many of a prompt's last tokens are not filtered. By default what the table says: half of the
            training length, or 0 by the paper's method, unless it was made with another number.
        calibrate: whether the engine makes a table itself where it finds none; "on" and "off" are taken too. Without,
            a missing table is an error.
        calibration_text: path of the text (.txt, .jsonl or .parquet) that the engine then calibrates on. By default
            the sample that comes with the package.
        calibration_method: how the table is then made: "paper"; or "unclamped", without its clamp, with a clipped mean,
            and with an unfiltered end for half of the budget.
    """

    table: str | None = None
    min_retention: float | None = None
    train_length: int | None = None
    filter: bool = True
    filter_generated: bool = False
    unfiltered_end: int | None = None
    calibrate: bool = True
    calibration_text: str | None = None
    calibration_method: str = "unclamped"

    def __post_init__(self) -> None:
        _check("table", self.table, str, "the path of a .safetensors file")
        _check("min_retention", self.min_retention, (int, float), "a number between 0 and 1")
        _check("filter", self.filter, bool, "true or false")
        _check("filter_generated", self.filter_generated, bool, "true or false")
        _check_tokens("train_length", self.train_length, 2)
        _check_tokens("unfiltered_end", self.unfiltered_end, 0)
        if isinstance(self.calibrate, str) and self.calibrate in _SWITCH:
            object.__setattr__(self, "calibrate", _SWITCH[self.calibrate])
        _check("calibrate", self.calibrate, bool, 'true or false ("on" or "off")')
        _check("calibration_text", self.calibration_text, str, "the path of a .txt, .jsonl or .parquet file")
        if self.calibration_method not in CALIBRATION_METHODS:
            rule = " or ".join(f'"{method}"' for method in CALIBRATION_METHODS)
            raise ValueError(_message("calibration_method", rule, self.calibration_method))
        if self.min_retention is not None and not 0.0 < self.min_retention < 1.0:
            raise ValueError(_message("min_retention", "a number between 0 and 1", self.min_retention))
        if self.filter_generated and self.unfiltered_end:
            raise ValueError(
                _message("unfiltered_end", "0 or left out where filter_generated is on", self.unfiltered_end)
            )

    def to_dict(self) -> dict[str, Any]:
        """The options as plain values that `options_from_config` reads back."""
        return asdict(self)


def options_from_config(additional_config: Any) -> LongMambaOptions:
    """Parse the "longmamba" entry of vLLM's additional config.

    Args:
        additional_config: `VllmConfig.additional_config`, a dict or None.

    Returns:
        The options, defaults where the entry is missing.

    Raises:
        ValueError: an unknown option, or a value of the wrong type or range.
    """
    given = options_given(additional_config, KEY, [field.name for field in fields(LongMambaOptions)])
    return LongMambaOptions(**given)


def options_given(additional_config: Any, key: str, known: list[str]) -> dict[str, Any]:
    """What a user gave under one key of vLLM's additional config; their values are not looked at.

    Raises:
        ValueError: no mapping, or a name that is not known.
    """
    given = additional_config.get(key, {}) if isinstance(additional_config, dict) else {}
    if not isinstance(given, dict):
        raise ValueError(f"additional_config[{key!r}] must be a mapping of options, but is {given!r}")
    unknown = [str(name) for name in given if name not in known]
    if unknown:
        raise ValueError(
            f"additional_config[{key!r}]: unknown option {', '.join(sorted(unknown))}; known are {', '.join(known)}"
        )
    return given


def expand_home(path: str, name: str) -> Path:
    """Returns a path with its "~" or "~user" replaced by the home folder that it stands for.

    Args:
        path: as the user wrote it.
        name: the option that it comes from.

    Raises:
        ValueError: there is no such user, or no home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(_message(name, "a path in a home folder that exists; write it out in full", path)) from None


def _check_tokens(name: str, value: Any, fewest: int) -> None:
    rule = f"a number of tokens, {fewest} to {_MOST_TOKENS}"
    _check(name, value, int, rule)
    if value is not None and not fewest <= value <= _MOST_TOKENS:
        raise ValueError(_message(name, rule, value))


def _check(name: str, value: Any, kind: Any, rule: str) -> None:
    if value is None and kind is not bool:
        return
    # bool is an int in Python, but true is not a number of tokens.
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(_message(name, rule, value))


def _message(name: str, rule: str, value: Any) -> str:
    # Python refuses to write integers of more than 4300 digits.
    is_huge = isinstance(value, int) and value.bit_length() > 128
    shown = f"an integer of {value.bit_length()} bits" if is_huge else repr(value)
    return f"additional_config[{KEY!r}]: {name} must be {rule}, but is {shown}"
