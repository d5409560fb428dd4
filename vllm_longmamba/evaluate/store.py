"""What an evaluation has measured and written: one SQLite file, from which an interrupted run goes on."""

import json
import secrets
import sqlite3
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from blake3 import blake3

Identity = Mapping[str, str | int | float | None]

FILE_NAME = "results.sqlite"
# "LMev" in the header of our files: SQLite's application_id, bytes 68 to 71.
_APPLICATION_ID = int.from_bytes(b"LMev", "big")
_TABLES = """
CREATE TABLE IF NOT EXISTS results (identity TEXT PRIMARY KEY, result TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS files (name TEXT, digest TEXT, PRIMARY KEY (name, digest));
"""


class Store:
    """The results of a folder, each known by what was measured (its identity), and the files written beside them.

    Args:
        folder: holds results.sqlite; made where it is missing.

    Raises:
        ValueError: results.sqlite is not ours, or damaged. At the end of a `with` block: it failed within.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._path = path = folder / FILE_NAME
        with path.open("ab+") as file:
            file.seek(0)
            header = file.read(72)
        if header and header[68:72] != _APPLICATION_ID.to_bytes(4, "big"):
            raise ValueError(f"{path}: not written by longmamba; move the file, or give another folder with --output")
        self._database = sqlite3.connect(path, isolation_level=None, timeout=60.0)
        try:
            if not header:
                self._database.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = NORMAL")
            self._database.executescript(_TABLES)
        except sqlite3.Error as error:
            self._database.close()
            raise self._failure(error) from None

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._database.close()
        if isinstance(error, sqlite3.Error):
            raise self._failure(error) from None

    def __contains__(self, identity: Identity) -> bool:
        return self._find(identity) is not None

    def add(self, identity: Identity, result: Mapping[str, Any]) -> None:
        """Keep a result: it is on disk when this returns."""
        row = (_key(identity), json.dumps(dict(result)))
        self._database.execute("INSERT OR REPLACE INTO results VALUES (?, ?)", row)

    def result(self, identity: Identity) -> dict[str, Any]:
        """The result of what is in the store."""
        found = self._find(identity)
        if found is None:
            raise KeyError(_key(identity))
        return dict(json.loads(found))

    def check_files(self, names: Iterable[str]) -> None:
        """Refuse to replace what an evaluation in this folder did not write.

        Args:
            names: of files in the folder that are to be written.

        Raises:
            ValueError: one of them is there, and is not ours as we left it.
        """
        for name in names:
            path = self.folder / name
            if path.exists() and not self._wrote(name, path.read_bytes()):
                raise ValueError(
                    f"{path}: was not written by this evaluation, or was changed since; move the file, or give another "
                    "folder with --output"
                )

    def write(self, files: Mapping[str, bytes]) -> None:
        """Write files into the folder, each of them whole or not at all.

        Raises:
            ValueError: as `check_files`; none is written then.
        """
        self.check_files(files)
        for name, content in files.items():
            self._database.execute("INSERT OR IGNORE INTO files VALUES (?, ?)", (name, _digest(content)))
            temporary = self.folder / f".{name}.{secrets.token_hex(8)}"
            try:
                temporary.write_bytes(content)
                temporary.replace(self.folder / name)
            finally:
                temporary.unlink(missing_ok=True)

    def _failure(self, error: sqlite3.Error) -> ValueError:
        """What SQLite says, with the file and what to do."""
        is_full = getattr(error, "sqlite_errorname", "") == "SQLITE_FULL"
        remedy = "make room" if is_full else "check the disk, or move the file"
        return ValueError(f"{self._path}: {error}; {remedy}, and give the same command again")

    def _wrote(self, name: str, content: bytes) -> bool:
        row = (name, _digest(content))
        return self._database.execute("SELECT 1 FROM files WHERE name = ? AND digest = ?", row).fetchone() is not None

    def _find(self, identity: Identity) -> str | None:
        row = self._database.execute("SELECT result FROM results WHERE identity = ?", (_key(identity),)).fetchone()
        return None if row is None else str(row[0])


def settings_key(settings: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that stand for settings: results of other settings are not mistaken for these."""
    return str(blake3(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16])


def _key(identity: Identity) -> str:
    return json.dumps(dict(identity), sort_keys=True)


def _digest(content: bytes) -> str:
    return str(blake3(content).hexdigest())
