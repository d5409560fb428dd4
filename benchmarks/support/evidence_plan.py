"""What `evidence.py` measures: settings -> units in the order of their importance, and the records of those done."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from vllm_longmamba.evaluate.store import settings_key

# As in `longmamba tune`: within this much of the most keys found, settings count as equally good at finding them.
FOUND_TOLERANCE = 0.05
SEARCH = "search, "
# Settings that are numbers of tokens, and shrink with the training length; pieces of a text do not.
_TOKENS = ("train_length", "shortest_document", "lengths", "end", "L_base")
SETTINGS = Path(__file__).resolve().parent.parent / "evidence.json"


def read_settings(file: Path = SETTINGS) -> dict[str, Any]:
    """Contents of a settings file."""
    settings: dict[str, Any] = json.loads(file.read_text())
    return settings


@dataclass(frozen=True)
class Setting:
    """How a model is run.

    Attributes:
        table: name of a table of the settings file.
        seed: of the table's calibration sequences.
        theta: `min_retention`; None takes the table's own, 1 is the plain model.
        end: as many of a prompt's last tokens are not filtered.
        dt_factor: MambaExtend's constant factor on dt.
        A_quantile: channels of |A| below this quantile of the model's get that |A|, so that they forget sooner.
        decimamba: DeciMamba's settings as JSON; "" where the engine is not DeciMamba's.
    """

    table: str = "default"
    seed: int = 0
    theta: float | None = None
    end: int = 0
    dt_factor: float = 1.0
    A_quantile: float = 0.0
    decimamba: str = ""

    def label(self) -> str:
        """What differs from the default, in words."""
        given = {name: value for name, value in asdict(self).items() if value != getattr(Setting, name)}
        return ", ".join(f"{name} {value}" for name, value in given.items()) or "default"


@dataclass(frozen=True)
class Unit:
    """One cell of the tables: what one method makes of one task in one text at one length.

    Attributes:
        model: name of its folder.
        method: as in the settings file; those tried in a search have its name in front.
        setting: how the model is run.
        task: "passkey", "needles", "text", or a task of RULER by its short name.
        text: kind of the haystack; "" where the task has its own.
        length: tokens of a prompt.
        count: questions; windows of each document where the task is "text".
        searching: on the text that is kept for searches.
        pieces: rule of the haystack as JSON where it is pieces of documents; otherwise "".
    """

    model: str
    method: str
    setting: Setting
    task: str
    text: str
    length: int
    count: int
    searching: bool = False
    pieces: str = ""

    @property
    def name(self) -> str:
        """In words, for logs."""
        return f"{self.model}: {self.method}: {self.task} {self.text} {self.length}"

    @property
    def key(self) -> str:
        """Stands for all of it."""
        return _key(self)

    def settings(self) -> dict[str, Any]:
        """What a record has of it; no `pieces` where there are none."""
        every = asdict(self)
        return every if self.pieces else {name: value for name, value in every.items() if name != "pieces"}

    def tokens(self, documents: int) -> int:
        """About how many tokens it takes.

        Args:
            documents: texts that windows are taken of.
        """
        return self.length * self.count * (documents if self.task == "text" else 1)


def for_train_length(settings: Mapping[str, Any], train_length: int) -> dict[str, Any]:
    """The settings for models of another training length: all lengths in tokens grow or shrink with it.

    Args:
        settings: contents of a settings file.
        train_length: tokens.
    """
    share = Fraction(train_length, settings["train_length"])

    def scaled(value: Any, is_tokens: bool = False) -> Any:
        if isinstance(value, Mapping):
            return {name: scaled(one, name in _TOKENS) for name, one in value.items()}
        if isinstance(value, list):
            return [scaled(one, is_tokens) for one in value]
        return int(value * share) if is_tokens else value

    whole = {name: value for name, value in settings.items() if name != "texts"}
    return {**scaled(whole), "texts": settings["texts"]}


@cache
def _key(unit: Unit) -> str:
    return settings_key(unit.settings())


Record = dict[str, Any]


class Plan:
    """The units of a settings file.

    Args:
        settings: contents of the file.
        models: names of the models' folders.
        decimates: those that DeciMamba can run.
    """

    def __init__(self, settings: Mapping[str, Any], models: Sequence[str], decimates: Sequence[str] = ()) -> None:
        self.settings = settings
        self._models = models
        self._decimates = decimates
        self._found: dict[tuple[str, str], Setting] = {}

    def units(self, records: Mapping[str, Record], only: str | None = None) -> Iterator[tuple[int, Unit]]:
        """The units that are left and can be run, the most important ones first, each with the number of its tier.

        Args:
            records: those done, by key. What a search found decides on the units that build on it.
            only: a single model; None takes all.
        """
        for tier, work in enumerate(self.settings["work"]):
            left: list[Unit] = []
            for model in [only] if only else self._models:
                if "search" in work:
                    for method in work["search"]:
                        left += self._search(model, method)
                else:
                    left += self._cells(model, work, records)
            left = [unit for unit in left if unit.key not in records]
            yield from ((tier, unit) for unit in sorted(left, key=lambda unit: -unit.length))

    def candidates(self, method: str) -> list[Setting]:
        """The settings that a search tries."""
        tried = self.settings["methods"][method]["search"]
        return [Setting(**dict(zip(tried, values, strict=True))) for values in product(*tried.values())]

    def pieces(self, text: str) -> str:
        """The rule of a kind of haystack, as a unit has it."""
        rule = self.settings["texts"].get(text, {})
        return json.dumps(rule, sort_keys=True) if "piece" in rule else ""

    def found(self, model: str, method: str, records: Mapping[str, Record]) -> Setting | None:
        """The setting of a method, that of a search by its records; None while those are not complete."""
        given = self.settings["methods"][method]
        if "decimamba" in given:
            setting = Setting(theta=1.0, decimamba=json.dumps(given["decimamba"], sort_keys=True))
            return setting if model in self._decimates else None
        if "search" not in given:
            return Setting(**given)
        if (model, method) not in self._found:
            best = self._best(model, method, records)
            if best is None:
                return None
            self._found[model, method] = best
        return self._found[model, method]

    def _best(self, model: str, method: str, records: Mapping[str, Record]) -> Setting | None:
        scores = {}
        for setting in self.candidates(method):
            units = list(self._search_units(model, method, setting))
            if any(unit.key not in records for unit in units):
                return None
            scores[setting] = score([records[unit.key] for unit in units])
        most = max(share for share, _ in scores.values())
        good = [setting for setting, (share, _) in scores.items() if share >= most - FOUND_TOLERANCE]
        return min(good, key=lambda setting: scores[setting][1])

    def _search(self, model: str, method: str) -> Iterator[Unit]:
        for setting in self.candidates(method):
            yield from self._search_units(model, method, setting)

    def _search_units(self, model: str, method: str, setting: Setting) -> Iterator[Unit]:
        for cells in self.settings["search"]:
            yield from self._cells_of(model, f"{SEARCH}{method}: {setting.label()}", setting, cells, searching=True)

    def _cells(self, model: str, work: Mapping[str, Any], records: Mapping[str, Record]) -> Iterator[Unit]:
        for method in work["methods"]:
            setting = self.found(model, method, records)
            if setting is not None:
                yield from self._cells_of(model, method, setting, work)

    def _cells_of(
        self, model: str, method: str, setting: Setting, cells: Mapping[str, Any], searching: bool = False
    ) -> Iterator[Unit]:
        for task, text, length in product(cells["tasks"], cells.get("texts", [""]), cells["lengths"]):
            count = cells["windows"] if task == "text" else cells["questions"]
            yield Unit(model, method, setting, task, text, length, count, searching, self.pieces(text))


def score(records: Sequence[Record]) -> tuple[float, float]:
    """Share of the numbers found, and nats a token of text, over some records; 0 where there are none."""
    asked = [record for record in records if "found" in record]
    texts = [record for record in records if "books" in record]
    questions = sum(record["unit"]["count"] for record in asked)
    tokens = sum(tail["tokens"] for record in texts for tail in record["books"].values())
    nats = sum(tail["nats"] for record in texts for tail in record["books"].values())
    return sum(record["found"] for record in asked) / max(questions, 1), nats / max(tokens, 1)


class Records:
    """The records of all *.jsonl in a folder, by key.

    Args:
        folder: its files may grow.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read: dict[Path, int] = {}
        self._records: dict[str, Record] = {}

    def all(self) -> Mapping[str, Record]:
        """Those that are there by now."""
        for file in sorted(self._folder.glob("*.jsonl")):
            with file.open("rb") as opened:
                opened.seek(self._read.get(file, 0))
                # The last line may be half of one.
                whole = opened.read().rpartition(b"\n")[0]
            self._read[file] = self._read.get(file, 0) + len(whole)
            for line in whole.splitlines():
                if line:
                    record = json.loads(line)
                    self._records[record["key"]] = record
        return self._records
