"""The script of benchmarks/ that writes the pages of results."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"

Script = Callable[..., None]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    """script("name", *arguments) runs benchmarks/name.py in this process."""
    import importlib

    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def run(name: str, *arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        module: ModuleType = importlib.import_module(name)
        module.main()

    return run


def test_tables_of_the_pages_are_those_of_the_records(script: Script) -> None:
    script  # noqa: B018 - puts benchmarks/ on the path
    from results_page import PAGES, RESULTS, ROOT, fill

    for name in PAGES:
        page = (ROOT / name).read_text()
        assert fill(page, RESULTS) == page, f"{name}: run python benchmarks/results_page.py"


def test_results_page_follows_the_records(script: Script, tmp_path: Path) -> None:
    from results_page import PAGES, RESULTS, ROOT

    results = tmp_path / "benchmarks" / "results"
    shutil.copytree(RESULTS, results)
    record = results / "reference-mamba1-4m" / "ablation-decode" / "report.json"
    report = json.loads(record.read_text())
    for row in report["passkey"]:
        if (row["method"], row["length"]) == ("filtered", 8192):
            row["share"] = 0.123
    record.write_text(json.dumps(report))
    for name in PAGES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text())
    script("results_page", "--results", results, "--root", tmp_path)
    for name in PAGES:
        now, before = ((folder / name).read_text().splitlines() for folder in (tmp_path, ROOT))
        changed = [line for line, old in zip(now, before, strict=True) if line != old]
        # One page has one cell of it.
        assert len(changed) == (name == "docs/results.md")
        for line in changed:
            assert "Mamba-1" in line
            assert "| 0.12 |" in line
    drawn = {path.name for path in (tmp_path / "docs" / "pictures").iterdir()}
    assert drawn >= {"evidence-keys.png", "evidence-text.png", "prefill.png"}


def test_a_table_that_is_not_known(script: Script) -> None:
    script  # noqa: B018 - puts benchmarks/ on the path
    from results_page import RESULTS, fill

    with pytest.raises(ValueError, match="no table is called 'passkeys'; there are generated, prefill"):
        fill("<!-- table: passkeys -->\n<!-- end -->\n", RESULTS)
