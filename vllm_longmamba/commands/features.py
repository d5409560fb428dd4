"""Which features of vLLM work with the filter: what features.toml says."""

import os
import tomllib
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

FAMILIES = {"mamba1": "Mamba-1", "mamba2": "Mamba-2", "zamba2": "Zamba2", "hybrids": "other hybrids"}
_FILE = Path(__file__).with_name("features.toml")
_SHOWN_BY = ("works", "gpu", "refused")
_UNSHOWN = ("untested", "absent")


@dataclass(frozen=True)
class Entry:
    """What is known of one feature for one family.

    Attributes:
        state: "works", "gpu", "refused", "untested" or "absent"; features.toml says what they mean.
        test: the test that shows it, below tests/.
        day: of the run on a GPU.
    """

    state: str
    test: str | None = None
    day: date | None = None

    @property
    def words(self) -> str:
        """For the matrix and the doctor."""
        if self.day is not None:
            return f"works (H200, {self.day.day} {self.day:%b %Y})"
        return {"untested": "not run", "absent": "–"}.get(self.state, self.state)


@dataclass(frozen=True)
class Feature:
    """One row of the matrix.

    Attributes:
        name: as the page has it.
        entries: family -> what is known.
        note: a remark, may be empty.
        setting: where an engine's configuration has it; None where each request decides, or nothing does.
        on, off: values of the setting that switch it on, or leave it off.
    """

    name: str
    entries: dict[str, Entry]
    note: str = ""
    setting: str | None = None
    on: tuple[str, ...] = ()
    off: tuple[str, ...] = ()

    def is_on(self, vllm_config: Any) -> bool:
        """Whether an engine with this configuration has it switched on."""
        if self.setting is None:
            return False
        owner, _, names = self.setting.partition(".")
        value: Any
        if owner == "env":
            value = os.environ.get(names)
        elif owner == "platform":
            from vllm.platforms import current_platform

            value = getattr(current_platform, names)
        else:
            value = vllm_config
            for name in self.setting.split("."):
                value = getattr(value, name, None)
        # Members of enumerations by their names.
        text = str(getattr(value, "name", value))
        return text in self.on if self.on else text not in ("None", "NONE", "False", "", "0", *self.off)


def read_features(path: Path = _FILE) -> list[Feature]:
    """The features of the file, in its order.

    Raises:
        ValueError: an entry is not of the form that features.toml describes.
    """
    return [_feature(given) for given in tomllib.loads(path.read_text(encoding="utf-8"))["feature"]]


def _feature(given: dict[str, Any]) -> Feature:
    name = given.pop("name")
    for_all = given.pop("all", None)
    entries = {family: _entry(given.pop(family, for_all), f"{name}, {family}") for family in FAMILIES}
    on, off = tuple(given.pop("on", ())), tuple(given.pop("off", ()))
    return Feature(name, entries, on=on, off=off, **given)


def _entry(given: Any, place: str) -> Entry:
    if given in _UNSHOWN:
        return Entry(given)
    if isinstance(given, dict):
        day = given.get("date")
        states = [state for state in given if state != "date"]
        if len(states) == 1 and states[0] in _SHOWN_BY and isinstance(day, date) == (states[0] == "gpu"):
            return Entry(states[0], given[states[0]], day)
    raise ValueError(
        f"features.toml: {place}: an entry must be of one of the forms at the top of the file, got {given!r}"
    )


def family_of(architecture: str) -> str:
    """The column of a model class, by its name in vLLM."""
    from vllm_longmamba.architectures import stock_name, supported

    module = supported()[stock_name(architecture)][0]
    return {"mamba": "mamba1"}.get(module, module if module in FAMILIES else "hybrids")
