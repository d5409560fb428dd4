"""Results as they come in, one JSON line each, so that an interrupted run goes on where it stopped."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blake3 import blake3

Identity = Mapping[str, str | int | float | None]


class Records:
    """A JSONL file of results, each known by what was measured (its identity).

    Args:
        path: the file; made where it is missing, read where it exists. A last line that was cut off while it was
            written is dropped.

    Raises:
        ValueError: another line is no record.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._results: dict[str, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes() if path.exists() else b""
        whole, newline, _ = content.rpartition(b"\n")
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                record = json.loads(line)
                self._results[_key(record["id"])] = record["result"]
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(
                    f"{path}, line {number}: not a result of this command ({error!r}); remove the file, or give "
                    "another folder for the results"
                ) from error
        path.write_bytes(whole + newline)
        self._file = path.open("a", encoding="utf-8")

    def __contains__(self, identity: Identity) -> bool:
        return _key(identity) in self._results

    def add(self, identity: Identity, result: Mapping[str, Any]) -> None:
        """Append a result to the file."""
        self._results[_key(identity)] = dict(result)
        self._file.write(json.dumps({"id": dict(identity), "result": dict(result)}) + "\n")
        self._file.flush()

    def result(self, identity: Identity) -> dict[str, Any]:
        """The result of what is in the records."""
        return self._results[_key(identity)]

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def settings_key(settings: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that stand for settings: results of other settings are not mistaken for these."""
    return str(blake3(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16])


def _key(identity: Identity) -> str:
    return json.dumps(identity, sort_keys=True)
