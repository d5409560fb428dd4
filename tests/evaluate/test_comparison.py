"""Methods side by side: nothing is run twice, and nothing is started where all results are there."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from contestants import HalfBlind

from vllm_longmamba.evaluate.comparison import Comparison
from vllm_longmamba.evaluate.needles import passkey_questions
from vllm_longmamba.evaluate.perplexity import windows
from vllm_longmamba.evaluate.store import Store
from vllm_longmamba.evaluate.texts import Book

QUESTIONS = list(passkey_questions([200, 300], [0.1, 0.9], [0]))
HAYSTACK = [Book("one", "lorem ipsum " * 20), Book("two", "dolor sit " * 20)]


def no_progress(description: str, total: int) -> Callable[[], None]:
    return lambda: None


def comparison(folder: Path, *contestants: HalfBlind, **settings: object) -> Comparison:
    named = {str(contestant.description["name"]): contestant for contestant in contestants}
    return Comparison(named, settings, Store(folder), no_progress)


def test_ask(tmp_path: Path) -> None:
    plain = HalfBlind("plain")
    answers = comparison(tmp_path, plain).ask(QUESTIONS, HAYSTACK)
    assert [(question.depth, result["found"]) for question, result in answers["plain"]] == [
        (0.1, True),
        (0.9, False),
    ] * 2
    assert answers["plain"][1][1]["answer"] == "dunno"
    assert answers["plain"][0][1]["asked"] == QUESTIONS[0].needles[0].number


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    interrupted = HalfBlind("plain", fail_after=3)
    with pytest.raises(KeyboardInterrupt):
        comparison(tmp_path, interrupted).ask(QUESTIONS, HAYSTACK)
    second = HalfBlind("plain")
    answers = comparison(tmp_path, second, HalfBlind("longmamba")).ask(QUESTIONS, HAYSTACK)
    assert second.jobs == len(QUESTIONS) - 3
    assert [question for question, _ in answers["plain"]] == QUESTIONS
    third = HalfBlind("plain")
    assert comparison(tmp_path, third).ask(QUESTIONS[:2], HAYSTACK)["plain"] == answers["plain"][:2]
    assert third.starts == 0


def test_results_of_other_settings_are_not_taken(tmp_path: Path) -> None:
    comparison(tmp_path, HalfBlind("plain"), wording="old").ask(QUESTIONS, HAYSTACK)
    other = HalfBlind("plain")
    comparison(tmp_path, other, wording="new").ask(QUESTIONS, HAYSTACK)
    assert other.jobs == len(QUESTIONS)
    changed = HalfBlind("plain")
    changed.description["table"] = "another"
    comparison(tmp_path, changed, wording="new").ask(QUESTIONS, HAYSTACK)
    assert changed.jobs == len(QUESTIONS)


def test_too_short_a_haystack_is_said_before_anything_starts(tmp_path: Path) -> None:
    plain = HalfBlind("plain")
    with pytest.raises(ValueError, match="needs 924 tokens of haystack"):
        comparison(tmp_path, plain).ask([*QUESTIONS, *passkey_questions([1000], [0.5], [0])], HAYSTACK)
    assert plain.starts == 0


def test_too_short_a_length_is_said_before_anything_starts(tmp_path: Path) -> None:
    plain = HalfBlind("plain")
    with pytest.raises(ValueError, match="a length of 60 tokens is too short"):
        comparison(tmp_path, plain).ask([*QUESTIONS, *passkey_questions([60], [0.5], [0])], HAYSTACK)
    assert plain.starts == 0


def test_score(tmp_path: Path) -> None:
    plain = HalfBlind("plain")
    books = [Book("ascii", "abcd" * 100), Book("umlauts", "ä" * 200)]

    def score(contestant: HalfBlind) -> list[tuple[object, dict[str, Any]]]:
        running = comparison(tmp_path, contestant)
        return running.score(books, lambda sizes: windows(sizes, [100, 400], 2, 50), 50)["plain"]

    losses = score(plain)
    assert len(losses) == 4
    assert all(loss == {"nats": 50.0, "tokens": 50, "bytes": 50} for _, loss in losses)
    again = HalfBlind("plain")
    assert score(again) == losses
    assert again.starts == 0
