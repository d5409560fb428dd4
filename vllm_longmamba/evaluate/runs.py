"""Runs a task with a model and keeps the results; what is in the records already is not run again."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

from vllm_longmamba.evaluate.methods import Runner
from vllm_longmamba.evaluate.needles import Question
from vllm_longmamba.evaluate.perplexity import Loss, Window
from vllm_longmamba.evaluate.records import Records
from vllm_longmamba.evaluate.texts import Encoder


def question_identity(question: Question, run: Mapping[str, str]) -> dict[str, Any]:
    """What tells a question's result from all others.

    Args:
        question: the question.
        run: method and key of the settings.
    """
    return {**run, "task": question.task, "length": question.length, "depth": question.depth, "seed": question.seed}


def window_identity(window: Window, run: Mapping[str, str]) -> dict[str, Any]:
    """What tells a window's result from all others."""
    return {**run, "task": "perplexity", **asdict(window)}


def ask_questions(
    runner: Runner,
    encoder: Encoder,
    questions: Iterable[Question],
    haystack: list[int],
    records: Records,
    run: Mapping[str, str],
    advance: Callable[[], None],
) -> None:
    """Ask a model the questions that have no answer yet.

    Args:
        runner: the model.
        encoder: its tokenizer.
        questions: the questions.
        haystack: tokens of the text to hide the needles in.
        records: takes the answers.
        run: method and key of the settings.
        advance: called after each answer.

    Raises:
        ValueError: too short a haystack, or too short a length.
    """

    def jobs() -> Iterator[tuple[Question, list[int], int]]:
        for question in questions:
            if question_identity(question, run) not in records:
                yield question, encoder.prompt(question, haystack), question.max_answer_tokens()

    for question, answer in runner.complete(jobs()):
        result = {
            "asked": [needle.number for needle in question.asked],
            "depths": [needle.depth for needle in question.asked],
            "answer": answer,
            "found": question.found_in(answer),
        }
        records.add(question_identity(question, run), result)
        advance()


def score_windows(
    runner: Runner,
    encoder: Encoder,
    windows: Iterable[Window],
    books: Mapping[str, list[int]],
    scored: int,
    records: Records,
    run: Mapping[str, str],
    advance: Callable[[], None],
) -> None:
    """Score the windows that have no loss yet; arguments as above.

    Args:
        books: tokens of each book.
        scored: tokens to score at a window's end.
    """

    def jobs() -> Iterator[tuple[Window, list[int]]]:
        for window in windows:
            if window_identity(window, run) not in records:
                yield window, window.tokens(books[window.book], encoder.prefix)

    for window, logprobs in runner.tail_logprobs(jobs(), scored):
        text = encoder.decode(window.tokens(books[window.book], encoder.prefix)[-scored:])
        loss = Loss(nats=-float(logprobs.sum()), tokens=scored, bytes=len(text.encode()))
        records.add(window_identity(window, run), asdict(loss))
        advance()
