"""Reports: the numbers, and that every one of them reaches the Markdown and the pictures."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from vllm_longmamba.evaluate.markdown import perplexity_markdown, questions_markdown
from vllm_longmamba.evaluate.needles import needle_questions, passkey_questions
from vllm_longmamba.evaluate.perplexity import Loss, Window
from vllm_longmamba.evaluate.pictures import draw_perplexity, draw_questions
from vllm_longmamba.evaluate.report import summarize_perplexity, summarize_questions
from vllm_longmamba.evaluate.statistics import wilson_interval

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
        "plain": [(one, {"found": [one.length == 512], "depths": [one.depth]}) for one in questions],
        "longmamba": [(one, {"found": [one.depth == 0.25], "depths": [one.depth]}) for one in questions],
    }
    return {**HEAD, **summarize_questions(answers)}


def perplexity_report() -> dict[str, Any]:
    losses = {
        method: [
            (Window(book, length, end), Loss(100.0 * factor * (1 + book_number), 100, 400))
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
    low, high = wilson_interval(0.5, 6)
    assert row == {"method": "longmamba", "length": 1024, "questions": 6, "share": 0.5, "low": low, "high": high}
    assert row_of(report["by_length"], method="plain", length=1024)["share"] == 0.0
    assert len(report["by_depth"]) == 8
    assert row_of(report["by_depth"], method="longmamba", length=512, depth=0.25)["share"] == 1.0
    assert row_of(report["by_depth"], method="longmamba", length=512, depth=0.75)["questions"] == 3


def test_a_question_for_several_numbers_is_one_question() -> None:
    questions = list(needle_questions([512], [0.5], [0, 1], 4, ask_all=True))
    depths = [[needle.depth for needle in one.asked] for one in questions]
    found = [[depth < 0.5 for depth in own] for own in depths]
    answers = [(one, {"found": flags, "depths": own}) for one, flags, own in zip(questions, found, depths, strict=True)]
    report = summarize_questions({"plain": answers})
    (row,) = report["by_length"]
    assert (row["questions"], row["share"]) == (2, 0.5)
    assert row_of(report["by_depth"], depth=0.125)["share"] == 1.0
    assert row_of(report["by_depth"], depth=0.875) == {**row_of(report["by_depth"], depth=0.875), "share": 0.0}


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
    text = questions_markdown(passkey_report(), "Passkey", ["heat-map.png"])
    assert text.startswith("# Passkey\n")
    assert "| prompt (tokens) | questions | plain | LongMamba |" in text
    assert "| 1024 | 6 | 0.00 (0.00 to 0.39) | 0.50 (0.19 to 0.81) |" in text
    assert "![heat-map.png](heat-map.png)" in text
    assert "- LongMamba: filter True, train_length 512, table 000000000000\n" in text


def test_perplexity_markdown() -> None:
    text = perplexity_markdown(perplexity_report(), [])
    expected = "| 512 | 2 | 4 | 1.500 (1.000 to 2.000) | 4.48 | 0.541 | 0.750 (0.500 to 1.000) | 2.12 | 0.271 |"
    assert f"{expected} -0.750 (-1.000 to -0.500) |" in text


def test_pictures(tmp_path: Path) -> None:
    names = draw_questions(passkey_report(), tmp_path, "Passkey") + draw_perplexity(perplexity_report(), tmp_path, "P")
    assert names == ["heat-map.png", "by-length.png", "perplexity.png"]
    for name in names:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    heat_map = (tmp_path / "heat-map.svg").read_text()
    # Every cell has its number: plain finds all of 512 and none of 1024, LongMamba all of one depth.
    assert heat_map.count(">100</text>") == 4
    assert heat_map.count(">0</text>") == 4
    assert "LongMamba" in (tmp_path / "by-length.svg").read_text()
    assert "trained on" in (tmp_path / "perplexity.svg").read_text()
    first = (tmp_path / "heat-map.svg").read_bytes()
    draw_questions(passkey_report(), tmp_path, "Passkey")
    assert (tmp_path / "heat-map.svg").read_bytes() == first


def test_reports_are_plain_values() -> None:
    for report in (passkey_report(), perplexity_report()):
        assert json.loads(json.dumps(report)) == report
