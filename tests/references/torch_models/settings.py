"""Settings of DeciMamba as a user gives them."""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from .methods import DeciMamba

SEARCH = "search"
_EXAMPLE = """--decimamba '{"layers": [6], "L_base": 2048}'"""


def read_decimamba(given: str | None) -> dict[str, Any]:
    """The option --decimamba: JSON, or a file of it, such as a search left.

    Raises:
        ValueError: neither, or None.
    """
    if given is None:
        raise ValueError(f"--method decimamba needs settings: {_EXAMPLE}, or --decimamba {SEARCH} to find some")
    text = given
    if not given.lstrip().startswith("{"):
        if not Path(given).is_file():
            raise ValueError(f"--decimamba must be JSON, a file of it, or {SEARCH}, got {given!r}; such as {_EXAMPLE}")
        text = Path(given).read_text(encoding="utf-8")
    try:
        settings = json.loads(text)
    except ValueError as error:
        raise ValueError(f"--decimamba: no JSON: {error}; such as {_EXAMPLE}") from None
    settings = settings.get("settings", settings) if isinstance(settings, dict) else settings
    return decimamba_from(settings).to_dict()


def decimamba_from(settings: Any) -> DeciMamba:
    """DeciMamba with these settings.

    Raises:
        ValueError: a name that it does not know, layers or L_base missing, or a value out of range.
    """
    names = [field.name for field in fields(DeciMamba)]
    if not isinstance(settings, Mapping) or not {"layers", "L_base"} <= set(settings) <= set(names):
        raise ValueError(
            f"--decimamba: the settings are {', '.join(names)}, the first two are needed; got {settings!r}"
        )
    try:
        return DeciMamba(**settings)
    except TypeError as error:
        raise ValueError(f"--decimamba: {error}, in {dict(settings)!r}; such as {_EXAMPLE}") from None
