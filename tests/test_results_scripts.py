"""The scripts of benchmarks/ that join reports, and that write the pages of results."""

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
    record = results / "reference-mamba1-4m" / "passkey" / "report.json"
    report = json.loads(record.read_text())
    for row in report["by_length"]:
        if (row["method"], row["length"]) == ("LongMamba, unclamped", 16384):
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
    assert drawn >= {"keys.png", "text.png", "depths.png", "prefill.png"}


def test_a_table_that_is_not_known(script: Script) -> None:
    script  # noqa: B018 - puts benchmarks/ on the path
    from results_page import RESULTS, fill

    with pytest.raises(ValueError, match="no table is called 'passkeys'; there are passkey, needles"):
        fill("<!-- table: passkeys -->\n<!-- end -->\n", RESULTS)


def _report(task: str, shares: dict[str, float], **changes: object) -> dict[str, object]:
    value = "share" if task == "passkey" else "loss"
    rows = [{"method": method, "length": 512, value: share} for method, share in shares.items()]
    compared = {} if task == "passkey" else {"compared_with": next(iter(shares))}
    methods = {method: {"weights": "these"} for method in shares}
    report = {"task": task, "settings": {"seeds": [0]}, "hardware": "it", "command": "do", "methods": methods}
    return report | {"by_length": rows} | compared | changes


@pytest.mark.parametrize("task", ["passkey", "perplexity"])
def test_other_methods_are_put_beside(script: Script, tmp_path: Path, task: str) -> None:
    def write(name: str, report: dict[str, object]) -> Path:
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps(report))
        return tmp_path / name

    ours = write("ours", _report(task, {"plain": 0.5, "longmamba": 0.9}))
    other = write("other", _report(task, {"plain": 0.5001, "decimamba": 0.6}))
    script("join_reports", ours, "--beside", other, "-o", tmp_path / "joined")
    joined = json.loads((tmp_path / "joined" / "report.json").read_text())
    assert list(joined["methods"]) == ["plain", "longmamba", "decimamba"]
    assert [(row["method"], row["length"]) for row in joined["by_length"]] == [
        (method, 512) for method in ("plain", "longmamba", "decimamba")
    ]
    assert joined["command"] == "do ; do"
    if task == "perplexity":
        assert joined["compared_with"] == "plain"
    wrong = {
        "settings": _report(task, {"plain": 0.5}, settings={"seeds": [1]}),
        "weights": _report(task, {"plain": 0.5}, methods={"plain": {"weights": "others"}}),
        "a method longmamba already": _report(task, {"plain": 0.5, "longmamba": 0.9}),
        "the plain model has 0.7": _report(task, {"plain": 0.7, "decimamba": 0.6}),
    }
    for number, (message, report) in enumerate(wrong.items()):
        with pytest.raises(SystemExit, match=message):
            script("join_reports", ours, "--beside", write(f"wrong{number}", report), "-o", tmp_path / "joined")
