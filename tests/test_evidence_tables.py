"""What the tables of docs/evidence.md show of the records of benchmarks/evidence.py."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _benchmarks_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def _cell(method: str, length: int, more: dict[str, Any] | None = None, **result: Any) -> dict[str, Any]:
    """A record, with a key of its own; `more` is the rest of its unit."""
    task = "text" if "books" in result else "passkey"
    unit = {
        "model": "tiny", "method": method, "task": task, "text": "" if task == "text" else "novels",
        "length": length, "count": 4, "searching": False, "setting": {}, **(more or {}),
    }  # fmt: skip
    return {"key": json.dumps(unit, sort_keys=True), "unit": unit, **result}


def _tables(folder: Path, records: list[dict[str, Any]]) -> Any:
    from support.evidence_tables import evidence_tables

    (folder / "tiny.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return evidence_tables(folder)


def test_haystacks_by_the_rule_take_the_place_of_others(tmp_path: Path) -> None:
    from support.evidence_plan import Plan, read_settings

    whole, pieces = {"text": "numbers"}, {"text": "numbers", "pieces": Plan(read_settings(), []).pieces("numbers")}
    old = [_cell("plain", 2048, whole, found=3), _cell("plain", 4096, pieces | {"pieces": "of another rule"}, found=3)]
    searched = _cell("search, paper: table C5", 2048, pieces | {"searching": True}, found=0)
    table = _tables(tmp_path, [*old, searched])["evidence-passkey-numbers"]()
    assert "| model, method | 2k | 4k |" in table
    assert "| tiny, plain | 0.75 | 0.75 |" in table
    for records in ([_cell("plain", 2048, pieces, found=1), *old], [*old, _cell("plain", 2048, pieces, found=1)]):
        table = _tables(tmp_path, [*records, _cell("plain", 4096, found=4)])
        assert "| model, method | 2k |\n" in table["evidence-passkey-numbers"]()
        assert "| tiny, plain | 0.25 |" in table["evidence-passkey-numbers"]()
        assert "| tiny, plain | 1.00 |" in table["evidence-passkey-novels"]()


def test_a_new_result_of_a_search_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    from support.evidence_plan import Plan, Setting, read_settings

    searches = [unit for _, unit in Plan(read_settings(), ["tiny"]).units({}) if unit.method.startswith("search, fac")]
    books = {"a": {"nats": 1.0, "tokens": 1}}
    records = [
        {
            "key": unit.key,
            "unit": unit.settings(),
            **({"books": books} if unit.task == "text" else {"found": 20 * (unit.setting.dt_factor == 0.4)}),
        }
        for unit in searches
    ]
    assert len(records) == 5 * 3
    found = {factor: {"setting": asdict(Setting(theta=1, dt_factor=factor))} for factor in (0.8, 0.4)}
    old, new = _cell("factor on dt", 16384, found[0.8], found=1), _cell("factor on dt", 16384, found[0.4], found=2)
    assert "| factor on dt (dt_factor 0.4) | 0.50 |" in _tables(tmp_path, [*records, old, new])["evidence-options"]()
    assert "| factor on dt (dt_factor 0.8) | 0.25 |" in _tables(tmp_path, [*records[1:], old])["evidence-options"]()


def test_records_become_tables(tmp_path: Path) -> None:
    import results_page

    book = {"nats": 300.0, "tokens": 100, "all_nats": 100.0, "all_tokens": 50}
    records = [
        {"key": "engine", "model": "tiny", "decimamba": "", "hardware": "an abacus"},
        _cell("plain", 2048, found=3),
        _cell("default", 131072, found=1),
        _cell("default", 2048, books={"a": book, "b": book | {"nats": 500.0}}),
        *(_cell(f"default{seed}", 16384, found=found) for seed, found in (("", 2), (", seed 1", 3), (", seed 2", 4))),
    ]
    results = tmp_path / "results"
    (tmp_path / "new.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    results_page.add_records(tmp_path / "new.jsonl", results / "evidence")
    (tmp_path / "new.jsonl").write_text(json.dumps(_cell("plain", 2048, found=4)) + "\n")
    results_page.add_records(tmp_path / "new.jsonl", results / "evidence")
    known = results_page.tables(results)
    assert "| model, method | 2k | 16k | 128k |" in known["evidence-passkey-novels"]()
    assert "| tiny, plain | 1.00 |  |  |" in known["evidence-passkey-novels"]()
    assert "| tiny, **default** |  | 0.50 | 0.25 |" in known["evidence-passkey-novels"]()
    assert "| tiny, **default** | 4.000 |" in known["evidence-text"]()
    assert "| tiny, **default** | 2.000 |" in known["evidence-text-all"]()
    assert "| tiny | **default** | 0.75 ± 0.25 |" in known["evidence-sequences"]()
    assert "an abacus" in known["evidence-conditions"]()
