"""The unfiltered end of prompts in a table: its digest, its metadata, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vllm_longmamba.tables import (
    TableMetadata,
    ThresholdTable,
    check_range,
    load_table,
    save_table,
    table_from_bytes,
    table_to_bytes,
)

MakeTable = Callable[..., ThresholdTable]


def test_digest(make_table: MakeTable) -> None:
    table = make_table()
    assert table.digest() == table.digest(unfiltered_end=0)
    different = {table.digest(theta, end) for theta in (None, 0.5) for end in (None, 1, 64, 256, 2**30)}
    assert len(different) == 10
    # What counts is what is filtered, not who says so.
    own = make_table(unfiltered_end=64)
    assert own.digest() == own.digest(1e-2, 64) == table.digest(None, 64)
    assert own.digest(unfiltered_end=0) == table.digest()
    assert own.digest(unfiltered_end=1) == table.digest(unfiltered_end=1)


def test_the_tables_own_end_is_the_default(make_table: MakeTable) -> None:
    assert make_table().unfiltered_end() == 0
    own = make_table(unfiltered_end=64)
    assert (own.unfiltered_end(), own.unfiltered_end(None)) == (64, 64)
    assert (own.unfiltered_end(0), own.unfiltered_end(7)) == (0, 7)


def test_the_end_is_saved(make_table: MakeTable, tmp_path: Path) -> None:
    table = make_table(unfiltered_end=64)
    assert table.metadata.unfiltered_end == 64
    save_table(table, tmp_path / "table")
    for loaded in (load_table(tmp_path / "table"), table_from_bytes(table_to_bytes(table))):
        assert loaded.metadata == table.metadata
        assert loaded.unfiltered_end() == 64
        assert loaded.digest() == table.digest()


@pytest.mark.parametrize("end", [-1, 1.0, "64", True, None], ids=repr)
def test_wrong_ends_are_refused(end: Any, make_metadata: Callable[..., TableMetadata], make_table: MakeTable) -> None:
    message = "unfiltered_end must be a number of tokens, 0 to 1073741824, got "
    with pytest.raises(ValueError, match=f"place: {message}"):
        check_range("unfiltered_end", end, "place")
    with pytest.raises(ValueError, match=f"TableMetadata: {message}"):
        make_metadata(unfiltered_end=end)
    if end is None:
        return
    with pytest.raises(ValueError, match=f"ThresholdTable: {message}"):
        make_table().unfiltered_end(end)
    with pytest.raises(ValueError, match=f"ThresholdTable: {message}"):
        make_table().digest(unfiltered_end=end)
