"""The tables of `evidence_numbers.py`."""

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import mean

from vllm_longmamba.evaluate.needles import KEY_DIGITS
from vllm_longmamba.evaluate.statistics import share_interval

from .evidence_plan import Record
from .evidence_tables import DEFAULT, LENGTHS, Evidence, markdown, name_of, short

CLASSES = ("key", "digits", "other")
PARTS = ("whole", "behind the key")
# Where a haystack has no digits.
NONE = "–"
# In the order of the table.
LABELS = {
    "numbers": "many numbers",
    "numbers, 2k": "its last 2k tokens, plain",
    "few numbers": "few numbers, same documents",
    "novels": "novels",
    "novels, digits added": "novels, with the digits of many numbers",
    "letters for digits": "letters for digits",
    "letters before the key": "letters for digits before the key only",
    "letters behind the key": "letters for digits behind the key only",
    "digits dropped": "oracle: digits get dt = 0",
    "digits do not write": "oracle: digits decay, but do not write",
    "digits do not decay": "oracle: digits write, but do not decay",
    "early key": "early key, letters before it",
    "early key, digits dropped": "the same, oracle: digits get dt = 0",
    "early key, digits do not write": "the same, oracle: digits decay, but do not write",
    "early key, digits do not decay": "the same, oracle: digits write, but do not decay",
    "thresholds times 16": "many numbers, thresholds times 16",
    "thresholds at the key": "oracle: thresholds just below the key's dt",
}


def numbers_tables(folder: Path) -> dict[str, Callable[[], str]]:
    """Every table that the page may name.

    Args:
        folder: of the records of evidence.py and evidence_numbers.py.
    """
    return {
        "evidence-why-numbers": lambda: _variations(_records(folder)),
        "evidence-few-digits": lambda: _few_digits(_records(folder), Evidence(folder)),
    }


def _records(folder: Path) -> list[Record]:
    return [json.loads(line) for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()]


def _few_digits(records: list[Record], evidence: Evidence) -> str:
    """How many prompts of "numbers" have few digits, and how many pass keys were found."""
    counted = {record["model"]: record["few_digits"] for record in records if "few_digits" in record}
    lengths = [length for length in LENGTHS if any(str(length) in few for few in counted.values())]
    rows = []
    for model, few in counted.items():
        cells = [evidence.cells[model, DEFAULT, "passkey", "numbers", length] for length in lengths]
        rows.append([f"{name_of(model)}, prompts with few digits", *(str(few[str(length)]) for length in lengths)])
        rows.append([f"{name_of(model)}, keys found", *(str(cell["found"]) for cell in cells)])
        rows.append([f"{name_of(model)}, of", *(str(cell["unit"]["count"]) for cell in cells)])
    return markdown(["", *map(short, lengths)], rows)


def _variations(records: list[Record]) -> str:
    """What was found, kept and left in each variation of the haystack; a record is one window of a variation."""
    groups: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        if "variation" in record:
            groups[record["model"], record["variation"]].append(record)
    order = list(LABELS)
    rows = []
    for model, variation in sorted(groups, key=lambda group: (group[0], order.index(group[1]))):
        of_variation = groups[model, variation]
        pairs = [pair for one in of_variation for pair in zip(one["keys"], one["answers"], strict=True)]
        found = [float(key == answer) for key, answer in pairs]
        low, high = share_interval(found)
        right = [mean(key[place] == answer[place : place + 1] for key, answer in pairs) for place in range(KEY_DIGITS)]
        rows.append(
            [
                name_of(model),
                LABELS[variation],
                f"{mean(one['digits'] for one in of_variation):.0f}",
                f"{mean(found):.2f} ({low:.2f} to {high:.2f}; {len(found)})",
                " ".join(f"{share:.2f}" for share in right),
                " ".join(_kept(of_variation, name) for name in CLASSES),
                _above_key(of_variation),
                " ".join(f"{_left(of_variation, part):.2f}" for part in PARTS),
            ]
        )
    head = ["model", "haystack", "digits", "keys found", "digits right", "kept", "dt above key's", "state left"]
    return markdown(head, rows)


def _kept(records: list[Record], name: str) -> str:
    """Share of the pairs of token and global channel that are not filtered, of a class of tokens."""
    kept, seen = (sum(one["kept"].get(name, (0, 0))[place] for one in records) for place in (0, 1))
    return f"{kept / seen:.3f}" if seen else NONE


def _above_key(records: list[Record]) -> str:
    """Share of the haystack's digits whose dt exceeds that of the key's digits, mean over the global channels."""
    shares = [share for share, channels in (one["above_key"] for one in records) if channels]
    return f"{mean(shares):.2f}" if shares else NONE


def _left(records: list[Record], part: str) -> float:
    """Share of the state that a part of the prompt leaves, mean over the global channels."""
    return mean(one["retention"][part][0] for one in records)
