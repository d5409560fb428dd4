"""Records survive an interruption, and results of other settings are not mistaken for one's own."""

from pathlib import Path

import pytest

from vllm_longmamba.evaluate.records import Records, settings_key

IDENTITY = {"method": "plain", "settings": "x", "task": "passkey", "length": 512, "depth": 0.5, "seed": 0}


def test_records_are_there_after_reopening(tmp_path: Path) -> None:
    path = tmp_path / "new" / "records.jsonl"
    records = Records(path)
    assert IDENTITY not in records
    records.add(IDENTITY, {"found": [True]})
    records.add({**IDENTITY, "depth": None}, {"found": [False, True]})
    # Not closed: what is added is on disk at once.
    again = Records(path)
    assert again.result(IDENTITY) == {"found": [True]}
    assert again.result(dict(reversed({**IDENTITY, "depth": None}.items()))) == {"found": [False, True]}
    assert {**IDENTITY, "settings": "y"} not in again
    assert {**IDENTITY, "length": 513} not in again
    records.close()
    again.close()


def test_a_line_that_was_cut_off_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    records = Records(path)
    records.add(IDENTITY, {"found": [True]})
    records.add({**IDENTITY, "seed": 1}, {"found": [True]})
    records.close()
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    records = Records(path)
    assert IDENTITY in records
    assert {**IDENTITY, "seed": 1} not in records
    records.add({**IDENTITY, "seed": 1}, {"found": [True]})
    records.close()
    assert path.read_bytes() == whole


def test_another_file_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text('{"id": {"a": 1}, "result": {}}\nsomething else\n')
    with pytest.raises(ValueError, match=r"records\.jsonl, line 2: not a result"):
        Records(path)
    assert path.read_text().endswith("something else\n")


def test_settings_key() -> None:
    assert settings_key({"a": 1, "b": [2]}) == settings_key({"b": [2], "a": 1})
    assert settings_key({"a": 1}) != settings_key({"a": 2})
