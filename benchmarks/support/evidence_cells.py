"""The records of `evidence.py` as the page shows them: cells, searches, engines."""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean

from vllm_longmamba.evaluate.statistics import share_interval

from .evidence_plan import Plan, Record, read_settings
from .records import MODELS

RULER = ("S1", "S2", "MK1", "MV", "MQ")
# What the pages call the models, in their order.
NAMES = {
    "ref2k-mamba1-36m": "Mamba-1, 36M",
    "ref2k-mamba2-36m": "Mamba-2, 36M",
    "m2s7-mamba2-36m": "Mamba-2, second seed, 36M",
    "rope2k-zamba2-36m": "Zamba2, 35M",
    **MODELS,
}


class Evidence:
    """The records of all models.

    Cells of haystacks by another rule than that of evidence.json are left out as soon as there is one by that rule: no
    table mixes them. So are cells with another setting than a method's search has found.

    Args:
        folder: with one *.jsonl a model.
    """

    def __init__(self, folder: Path) -> None:
        self.cells: dict[tuple[str, str, str, str, int], Record] = {}
        self.searched: dict[tuple[str, str], list[Record]] = defaultdict(list)
        self.engines: dict[str, list[Record]] = defaultdict(list)
        self.inspected: dict[str, Record] = {}
        # Of evidence_numbers.py: a record a window; those of one model are expected.
        self.variations: dict[str, list[Record]] = defaultdict(list)
        measured = []
        for file in sorted(folder.glob("*.jsonl")):
            for line in file.read_text().splitlines():
                record = json.loads(line)
                if "variation" in record:
                    self.variations[record["variation"]].append(record)
                elif "distance" in record:
                    self.inspected[record["model"]] = record
                elif "unit" in record:
                    measured.append(record)
                else:
                    self.engines[record["model"]].append(record)
        self._add(measured)
        self.models = sorted({model for model, *_ in self.cells}, key=_place)
        self.methods = list(dict.fromkeys(method for _, method, *_ in self.cells))

    def _add(self, measured: Sequence[Record]) -> None:
        units = [record["unit"] for record in measured]
        settings, by_key = read_settings(), {record["key"]: record for record in measured}
        plan = Plan(settings, [])
        by_rule = [unit.get("pieces", "") == plan.pieces(unit["text"]) for unit in units]
        kinds = [(unit["text"], unit["searching"]) for unit in units]
        replaced = {kind for kind, is_by_rule in zip(kinds, by_rule, strict=True) if is_by_rule}
        for record, unit, kind, is_by_rule in zip(measured, units, kinds, by_rule, strict=True):
            if kind in replaced and not is_by_rule:
                continue
            model, method = unit["model"], unit["method"]
            if unit["searching"]:
                self.searched[model, method].append(record)
                continue
            if "search" in settings["methods"].get(method, {}):
                found = plan.found(model, method, by_key)
                if found is not None and asdict(found) != unit["setting"]:
                    continue
            key = (model, method, unit["task"], unit["text"], unit["length"])
            # Of two with another number of questions, the larger one.
            if key not in self.cells or self.cells[key]["unit"]["count"] < unit["count"]:
                self.cells[key] = record

    def share(self, model: str, method: str, task: str, text: str, length: int) -> tuple[float, float, float] | None:
        """Share of the numbers found, with its 95 % interval; None where it was not measured."""
        record = self.cells.get((model, method, task, text, length))
        if record is None:
            return None
        scores = _scores(record)
        return (sum(scores) / len(scores), *share_interval(scores))

    def loss(self, model: str, method: str, length: int, of: str = "") -> float | None:
        """Nats a token over the last 100 tokens of the windows; over all of them where `of` is "all_"."""
        record = self.cells.get((model, method, "text", "", length))
        if record is None:
            return None
        books = record["books"].values()
        return float(sum(book[f"{of}nats"] for book in books) / sum(book[f"{of}tokens"] for book in books))

    def ruler(self, model: str, method: str, length: int, tasks: Sequence[str] = RULER) -> float | None:
        """Mean score of RULER's tasks; None where one of them was not measured."""
        shares = [self.share(model, method, task, "", length) for task in tasks]
        return None if None in shares else mean(share[0] for share in shares if share is not None)


def _scores(record: Record) -> list[float]:
    if "scores" in record:
        return list(record["scores"])
    return [1.0] * record["found"] + [0.0] * (record["unit"]["count"] - record["found"])


def name_of(model: str) -> str:
    """What the pages call a model."""
    return NAMES.get(model, model)


def _place(model: str) -> tuple[int, str]:
    named = list(NAMES)
    return (named.index(model) if model in named else len(named)), model
