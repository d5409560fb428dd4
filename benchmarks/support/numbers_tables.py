"""The tables of `evidence_numbers.py`."""

from collections.abc import Callable, Sequence
from statistics import mean

from vllm_longmamba.evaluate.statistics import share_interval

from .evidence_plan import Record
from .markdown import markdown

CLASSES = ("key", "digits", "other")
# Where a haystack has no digits.
NONE = "–"
HAYSTACKS = {
    "numbers": "many numbers",
    "numbers, 2k": "its last 2k tokens, plain",
    "few numbers": "few numbers, from the same documents",
    "novels": "novels",
    "novels, digits added": "novels, with the digits of many numbers",
    "letters for digits": "many numbers, letters for digits",
    "letters before the key": "letters for digits before the key only",
    "letters behind the key": "letters for digits after the key only",
}
# Of the digits of the haystack, with a late and with an early key.
ORACLES = {
    "as they are": ("numbers", "early key"),
    "dt = 0": ("digits dropped", "early key, digits dropped"),
    "decay, but do not write": ("digits do not write", "early key, digits do not write"),
    "write, but do not decay": ("digits do not decay", "early key, digits do not decay"),
}
THRESHOLDS = {
    "numbers": "of the table",
    "thresholds times 16": "16 times as large",
    "thresholds at the key": "just below the key's dt",
}


def numbers_tables(groups: dict[str, list[Record]]) -> dict[str, Callable[[], str]]:
    """Every table that the page may name.

    Args:
        groups: variation -> its records, one a window.
    """
    return {
        "evidence-numbers-haystacks": lambda: _haystacks(groups),
        "evidence-numbers-oracles": lambda: _oracles(groups),
        "evidence-numbers-thresholds": lambda: _thresholds(groups),
    }


def _haystacks(groups: dict[str, list[Record]]) -> str:
    rows = []
    for name, label in _measured(HAYSTACKS, groups):
        digits = [one["digits"] for one in groups[name]]
        rows.append([label, f"{min(digits)} to {max(digits)}", _found(groups[name]), _left(groups[name])])
    return markdown(["haystack", "digits in it", "keys found", "state left"], rows)


def _measured(labels: dict[str, str], groups: dict[str, list[Record]]) -> list[tuple[str, str]]:
    return [(name, label) for name, label in labels.items() if name in groups]


def _oracles(groups: dict[str, list[Record]]) -> str:
    rows = [
        [label, *(cell for place in places for cell in (_found(groups[place]), _left(groups[place])))]
        for label, places in ORACLES.items()
        if all(place in groups for place in places)
    ]
    return markdown(["digits", "late key found", "state left", "early key found", "state left"], rows)


def _thresholds(groups: dict[str, list[Record]]) -> str:
    rows = [
        [label, _found(groups[name]), *(_kept(groups[name], of) for of in CLASSES), _above_key(groups[name])]
        for name, label in _measured(THRESHOLDS, groups)
    ]
    kept = ["kept of the key's digits", "of the haystack's", "of other tokens"]
    return markdown(["thresholds", "keys found", *kept, "haystack's digits with a larger dt"], rows)


def _found(records: Sequence[Record]) -> str:
    pairs = [pair for one in records for pair in zip(one["keys"], one["answers"], strict=True)]
    found = [float(key == answer) for key, answer in pairs]
    low, high = share_interval(found)
    return f"{sum(found):.0f} of {len(found)} ({low:.2f} to {high:.2f})"


def _kept(records: Sequence[Record], name: str) -> str:
    """Share of the pairs of token and global channel that are not filtered, of a class of tokens."""
    kept, seen = (sum(one["kept"].get(name, (0, 0))[place] for one in records) for place in (0, 1))
    return f"{kept / seen:.2f}" if seen else NONE


def _above_key(records: Sequence[Record]) -> str:
    """Share of the haystack's digits whose dt exceeds that of the key's digits, mean over the global channels."""
    shares = [share for share, channels in (one["above_key"] for one in records) if channels]
    return f"{mean(shares):.2f}" if shares else NONE


def _left(records: Sequence[Record]) -> str:
    """Share of the state that is left after what stands behind the key, mean over the global channels."""
    return f"{mean(one['retention']['behind the key'][0] for one in records):.2f}"
