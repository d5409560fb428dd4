"""Reports: the numbers, and that every one of them reaches the Markdown and the pictures."""

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.markdown import Markdown

from vllm_longmamba.evaluate.markdown import document, perplexity_markdown, questions_markdown
from vllm_longmamba.evaluate.needles import passkey_questions
from vllm_longmamba.evaluate.perplexity import Window
from vllm_longmamba.evaluate.pictures import draw_perplexity, draw_questions
from vllm_longmamba.evaluate.report import (
    FILES,
    PICTURES,
    summarize_perplexity,
    summarize_questions,
    write_report,
)
from vllm_longmamba.evaluate.statistics import share_interval
from vllm_longmamba.evaluate.store import FILE_NAME, Store

HEAD = {
    "model": "a model",
    "command": "longmamba eval",
    "hardware": "CPU",
    "methods": {"plain": {"filter": False}, "longmamba": {"filter": True, "train_length": 512, "table": "0" * 32}},
    "settings": {"scored_tokens": 100},
}


def passkey_report() -> dict[str, Any]:
    questions = list(passkey_questions([512, 1024], [0.25, 0.75], [0, 1, 2]))
    answers = {
        "plain": [(one, {"found": one.length == 512}) for one in questions],
        "longmamba": [(one, {"found": one.depth == 0.25}) for one in questions],
    }
    return {**HEAD, **summarize_questions(answers)}


def perplexity_report() -> dict[str, Any]:
    losses = {
        method: [
            (Window(book, length, end), {"nats": 100.0 * factor * (1 + book_number), "tokens": 100, "bytes": 400})
            for length in (512, 1024)
            for book_number, book in enumerate(["a", "b"])
            for end in (1024, 2048)
        ]
        for method, factor in (("plain", 1.0), ("longmamba", 0.5))
    }
    return {**HEAD, **summarize_perplexity(losses)}


def row_of(rows: list[dict[str, Any]], **values: Any) -> dict[str, Any]:
    (found,) = [row for row in rows if all(row[name] == value for name, value in values.items())]
    return found


def test_summarize_questions() -> None:
    report = passkey_report()
    row = row_of(report["by_length"], method="longmamba", length=1024)
    low, high = share_interval([1.0, 0.0] * 3)
    assert row == {"method": "longmamba", "length": 1024, "questions": 6, "share": 0.5, "low": low, "high": high}
    assert row_of(report["by_length"], method="plain", length=1024)["share"] == 0.0
    assert len(report["by_depth"]) == 8
    assert row_of(report["by_depth"], method="longmamba", length=512, depth=0.25)["share"] == 1.0
    assert row_of(report["by_depth"], method="longmamba", length=512, depth=0.75)["questions"] == 3


def test_summarize_perplexity() -> None:
    rows = perplexity_report()["by_length"]
    plain, long = (row_of(rows, method=method, length=1024) for method in ("plain", "longmamba"))
    assert (plain["books"], plain["windows"], plain["tokens"]) == (2, 4, 400)
    assert plain["loss"] == pytest.approx(1.5)
    assert plain["perplexity"] == pytest.approx(math.exp(1.5))
    assert plain["bits_per_byte"] == pytest.approx(1.5 / 4 / math.log(2))
    # Two books, of losses 1 and 2: draws of one book twice are a quarter each, more than 2.5 %.
    assert (plain["low"], plain["high"]) == pytest.approx((1.0, 2.0))
    assert "difference" not in plain
    assert long["difference"] == pytest.approx({"loss": -0.75, "low": -1.0, "high": -0.5})


def test_questions_markdown() -> None:
    report = passkey_report()
    text = document(report, "Passkey", questions_markdown(report), ["heat-map.png", "heat-map.svg"])
    assert text.startswith("# Passkey\n")
    assert "| prompt (tokens) | questions | plain | LongMamba |" in text
    assert "| 1024 | 6 | 0.00 (0.00 to 0.39) | 0.50 (0.19 to 0.81) |" in text
    assert "![heat-map.png](heat-map.png)\n\n## Conditions" in text
    conditions = text.partition("```json\n")[2].removesuffix("\n```\n")
    assert json.loads(conditions) == HEAD


def test_perplexity_markdown() -> None:
    text = perplexity_markdown(perplexity_report())[-1]
    expected = "| 512 | 2 | 4 | 1.500 (1.000 to 2.000) | 4.48 | 0.541 | 0.750 (0.500 to 1.000) | 2.12 | 0.271 |"
    assert f"{expected} -0.750 (-1.000 to -0.500) |" in text


def test_names_that_are_not_ours_are_text() -> None:
    """In the report, and where it is shown on the terminal."""
    report = {**passkey_report(), "model": "a[bold]*b*_c_|`d`", "command": "eval `x` [/red]"}
    report["settings"] = {"texts": {"book_*one*[/]": "0" * 32}}
    text = document(report, "Passkey: a[bold]*b*_c_|`d`", questions_markdown(report), [])
    shown = io.StringIO()
    Console(file=shown, width=200).print(Markdown(text))
    for name in ("Passkey: a[bold]*b*_c_|`d`", '"model": "a[bold]*b*_c_|`d`"', "eval `x` [/red]", "book_*one*[/]"):
        assert name in shown.getvalue()


def test_pictures() -> None:
    # A model's name may look like a formula.
    passkey = draw_questions(passkey_report(), "Passkey: $a_b")
    pictures = passkey | draw_perplexity(perplexity_report(), "P")
    # Those of `longmamba tune` are in test_tuning.py.
    own = [one for one in PICTURES if one != "tuning"]
    assert sorted(pictures) == sorted(f"{one}.{kind}" for one in own for kind in ("png", "svg"))
    assert all(content.startswith(b"\x89PNG") for name, content in pictures.items() if name.endswith(".png"))
    heat_map = pictures["heat-map.svg"].decode()
    assert "Passkey: $a_b" in heat_map
    # Every cell has its number: plain finds all of 512 and none of 1024, LongMamba all of one depth.
    assert heat_map.count(">100</text>") == 4
    assert heat_map.count(">0</text>") == 4
    assert "LongMamba" in pictures["by-length.svg"].decode()
    assert "trained on" in pictures["perplexity.svg"].decode()
    assert draw_questions(passkey_report(), "Passkey: $a_b") == passkey


def test_reports_are_plain_values() -> None:
    for report in (passkey_report(), perplexity_report()):
        assert json.loads(json.dumps(report)) == report


def test_a_report_replaces_its_own_files_only(tmp_path: Path) -> None:
    report = passkey_report()

    def write(title: str) -> None:
        with Store(tmp_path) as store:
            write_report(store, report, title, questions_markdown, draw_questions)

    write("first")
    # As the name of a file may be.
    report["command"] = "longmamba eval --haystack book\udcff.txt"
    write("second")
    assert "book\\udcff.txt" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "report.md").read_text().startswith("# second: a model\n")
    assert {path.name for path in tmp_path.iterdir()} - {FILE_NAME} < set(FILES)
    (tmp_path / "heat-map.svg").write_text("precious")
    with pytest.raises(ValueError, match=r"heat-map\.svg: was not written by this evaluation"):
        write("third")
    assert (tmp_path / "report.md").read_text().startswith("# second: a model\n")
    assert (tmp_path / "heat-map.svg").read_text() == "precious"
