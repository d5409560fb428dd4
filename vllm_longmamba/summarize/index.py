"""Which ids are done, and which this run has seen: a temporary database, so that memory does not grow with rows."""

import sqlite3
from enum import Enum

from blake3 import blake3

# Pages of the database that stay in memory, in KiB; SQLite takes a negative number as such.
_CACHE_KIB = -8192


class Verdict(Enum):
    """What to do with a record."""

    NEW = "new"
    DONE = "done"
    CHANGED = "changed"
    REPEATED = "repeated"
    CLASHING = "clashing"


class Index:
    """Ids with the hash of the content that they were answered for."""

    def __init__(self) -> None:
        # An empty name is a temporary file that SQLite deletes; the reading thread uses it after the main one.
        self._database = sqlite3.connect("", check_same_thread=False, isolation_level=None)
        self._database.execute(f"PRAGMA cache_size = {_CACHE_KIB}")
        self._database.execute("PRAGMA journal_mode = OFF")
        self._database.execute("PRAGMA synchronous = OFF")
        self._database.execute("CREATE TABLE ids (key BLOB PRIMARY KEY, hash TEXT, seen INTEGER) WITHOUT ROWID")
        # One transaction for ever: nobody but this connection reads it, and a statement costs no locking.
        self._database.execute("BEGIN")

    def add(self, record_id: str, content_hash: str) -> bool:
        """Note a row of an earlier run; True if the id was there already."""
        key = _key(record_id)
        known = self._database.execute("SELECT 1 FROM ids WHERE key = ?", (key,)).fetchone() is not None
        self._database.execute("INSERT OR REPLACE INTO ids VALUES (?, ?, 0)", (key, content_hash))
        return known

    def admit(self, record_id: str, content_hash: str) -> Verdict:
        """Decide on a record of the input, and note that this run has seen its id.

        Returns:
            NEW: an id without a row. DONE: answered already. CHANGED: its row is for another content. REPEATED: this
            run has seen the id with the same content. CLASHING: this run has seen the id with another content.
        """
        key = _key(record_id)
        known = self._database.execute("SELECT hash, seen FROM ids WHERE key = ?", (key,)).fetchone()
        if known is not None and known[1]:
            return Verdict.REPEATED if known[0] == content_hash else Verdict.CLASHING
        self._database.execute("INSERT OR REPLACE INTO ids VALUES (?, ?, 1)", (key, content_hash))
        if known is None:
            return Verdict.NEW
        return Verdict.DONE if known[0] == content_hash else Verdict.CHANGED

    def close(self) -> None:
        """Delete the database."""
        self._database.close()


def _key(record_id: str) -> bytes:
    return blake3(record_id.encode("utf-8", "surrogatepass")).digest(16)
