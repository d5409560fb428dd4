"""Runs a task with one method after the other; one engine at a time, and none where all results are there."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_longmamba.evaluate.methods import METHODS, Contestant, ModelSettings
from vllm_longmamba.evaluate.needles import Question
from vllm_longmamba.evaluate.perplexity import Loss, Window
from vllm_longmamba.evaluate.records import Records, settings_key
from vllm_longmamba.evaluate.runs import ask_questions, question_identity, score_windows, window_identity
from vllm_longmamba.evaluate.texts import Book

# Called with what begins and the number of its steps; returns what to call after each step.
Progress = Callable[[str, int], Callable[[], None]]
Answers = dict[str, list[tuple[Question, dict[str, Any]]]]
Losses = dict[str, list[tuple[Window, Loss]]]


@dataclass
class Comparison:
    """Methods side by side on one model.

    Attributes:
        contestants: method -> model, not yet started.
        settings: of the task; with a contestant's description they tell its results from others.
        records: takes the results.
        progress: shows it.
    """

    contestants: Mapping[str, Contestant]
    settings: Mapping[str, Any]
    records: Records
    progress: Progress

    def _run(self, method: str) -> dict[str, str]:
        key = settings_key({**self.contestants[method].description, **self.settings})
        return {"method": method, "settings": key}

    def ask(self, questions: Sequence[Question], haystack: Iterable[Book]) -> Answers:
        """Ask every contestant all questions.

        Returns:
            Method -> the questions and what became of them (see `runs.ask_questions`).

        Raises:
            ValueError: too short a haystack or length; nothing was started then.
        """
        text = "".join(book.text for book in haystack)
        answers: Answers = {}
        for method, contestant in self.contestants.items():
            run = self._run(method)
            todo = [question for question in questions if question_identity(question, run) not in self.records]
            if todo:
                encoder = contestant.encoder
                tokens = encoder.encode(text)
                for question in (min(todo, key=lambda one: one.length), max(todo, key=lambda one: one.length)):
                    encoder.prompt(question, tokens)
                with contestant.start() as runner:
                    advance = self.progress(method, len(todo))
                    ask_questions(runner, encoder, todo, tokens, self.records, run, advance)
            answers[method] = [
                (question, self.records.result(question_identity(question, run))) for question in questions
            ]
        return answers

    def score(
        self, books: Iterable[Book], choose: Callable[[Mapping[str, int]], Iterable[Window]], scored: int
    ) -> Losses:
        """Score the end of windows with every contestant.

        Args:
            books: the texts.
            choose: the windows, from the number of tokens of each book.
            scored: tokens to score.

        Returns:
            Method -> the windows and their losses.
        """
        texts = list(books)
        losses: Losses = {}
        for method, contestant in self.contestants.items():
            run = self._run(method)
            tokens = {book.name: contestant.encoder.encode(book.text) for book in texts}
            room = len(contestant.encoder.prefix)
            windows = list(choose({name: len(book) + room for name, book in tokens.items()}))
            todo = [window for window in windows if window_identity(window, run) not in self.records]
            if todo:
                with contestant.start() as runner:
                    advance = self.progress(method, len(todo))
                    score_windows(runner, contestant.encoder, todo, tokens, scored, self.records, run, advance)
            losses[method] = [(window, Loss(**self.records.result(window_identity(window, run)))) for window in windows]
        return losses


def contestants(methods: Iterable[str], settings: ModelSettings) -> dict[str, Contestant]:
    """Prepare the methods of a comparison."""
    return {method: METHODS[method](settings) for method in methods}
