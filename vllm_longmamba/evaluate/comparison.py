"""Runs a task with one method after the other; one engine at a time, and none where all results are there."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_longmamba.evaluate.engine import EngineContestant, EngineRunner
from vllm_longmamba.evaluate.needles import ANSWER_TOKENS, Question
from vllm_longmamba.evaluate.perplexity import Window
from vllm_longmamba.evaluate.store import Store, settings_key
from vllm_longmamba.evaluate.texts import Book, Encoder

# Called with what begins and the number of its steps; returns what to call after each step.
Progress = Callable[[str, int], Callable[[], None]]
# Questions or windows, and what was measured of each: see `ask` and `score`.
Results = list[tuple[Any, dict[str, Any]]]
Measured = Iterator[tuple[Any, dict[str, Any]]]
# From a tokenizer to all that is to be measured, and to what measures some of it.
Task = Callable[[Encoder], tuple[Sequence[Any], Callable[[EngineRunner, list[Any]], Measured]]]


def ask(runner: EngineRunner, encoder: Encoder, questions: Iterable[Question], haystack: list[int]) -> Measured:
    """Ask a model questions.

    Args:
        runner: the model.
        encoder: its tokenizer.
        questions: the questions.
        haystack: tokens of the text to hide the needles in.

    Returns:
        Each question with the number "asked" for, the "answer", and whether it was "found".
    """
    jobs = ((question, encoder.prompt(question, haystack), ANSWER_TOKENS) for question in questions)
    for question, answer in runner.complete(jobs):
        yield question, {"asked": question.asked.number, "answer": answer, "found": question.found_in(answer)}


def score(
    runner: EngineRunner, encoder: Encoder, windows: Iterable[Window], books: Mapping[str, list[int]], scored: int
) -> Measured:
    """Score the end of windows; runner and encoder as above.

    Args:
        windows: the windows.
        books: tokens of each book.
        scored: tokens to score at a window's end.

    Returns:
        Each window with the negative log-likelihood of its last tokens in "nats", how many "tokens" these are, and the
        "bytes" of their text in UTF-8.
    """
    prompts = ((window, window.tokens(books[window.book], encoder.prefix)) for window in windows)
    for window, logprobs in runner.tail_logprobs(prompts, scored):
        text = encoder.decode(window.tokens(books[window.book], encoder.prefix)[-scored:])
        yield window, {"nats": -float(logprobs.sum()), "tokens": scored, "bytes": len(text.encode())}


@dataclass(frozen=True)
class Run:
    """One model's results in a store; what is there already is not measured again.

    Attributes:
        store: takes the results.
        name: of the method.
        key: of the model's description and the task's settings.

    What is measured, a question or a window, has an `identity` within the run.
    """

    store: Store
    name: str
    key: str

    def _identity(self, of: Any) -> dict[str, Any]:
        return {"method": self.name, "settings": self.key, **of.identity}

    def missing(self, all_of_them: Iterable[Any]) -> list[Any]:
        """The questions or windows that have no result yet."""
        return [one for one in all_of_them if self._identity(one) not in self.store]

    def add(self, measured: Measured, advance: Callable[[], None]) -> None:
        """Keep results as they come; `advance` is called after each."""
        for one, result in measured:
            self.store.add(self._identity(one), result)
            advance()

    def results(self, all_of_them: Iterable[Any]) -> Results:
        """Questions or windows with their results."""
        return [(one, self.store.result(self._identity(one))) for one in all_of_them]


@dataclass(frozen=True)
class Comparison:
    """Methods side by side on one model.

    Attributes:
        contestants: method -> model, not yet started.
        settings: of the task; with a contestant's description they tell its results from others.
        store: takes the results.
        progress: shows it.
    """

    contestants: Mapping[str, EngineContestant]
    settings: Mapping[str, Any]
    store: Store
    progress: Progress

    def run(self, method: str) -> Run:
        """The results of a method."""
        return Run(self.store, method, settings_key({**self.contestants[method].description, **self.settings}))

    def ask(self, questions: Sequence[Question], haystack: Iterable[Book]) -> dict[str, Results]:
        """Ask every contestant all questions.

        Returns:
            Method -> the questions and what became of them.

        Raises:
            ValueError: too short a haystack or length; nothing was started then.
        """
        text = "".join(book.text for book in haystack)

        def asking(encoder: Encoder) -> tuple[Sequence[Question], Callable[[EngineRunner, list[Question]], Measured]]:
            tokens = encoder.encode(text)
            encoder.check_room(questions, tokens)
            return questions, lambda runner, todo: ask(runner, encoder, todo, tokens)

        return self._measure(asking)

    def score(
        self, books: Iterable[Book], choose: Callable[[Mapping[str, int]], Iterable[Window]], scored: int
    ) -> dict[str, Results]:
        """Score the end of windows with every contestant.

        Args:
            books: the texts.
            choose: the windows, from the number of tokens of each book.
            scored: tokens to score.

        Returns:
            Method -> the windows and their losses.
        """
        texts = {book.name: book.text for book in books}

        def scoring(encoder: Encoder) -> tuple[Sequence[Window], Callable[[EngineRunner, list[Window]], Measured]]:
            tokens = {name: encoder.encode(text) for name, text in texts.items()}
            windows = list(choose(encoder.sizes(tokens)))
            return windows, lambda runner, todo: score(runner, encoder, todo, tokens, scored)

        return self._measure(scoring)

    def _measure(self, task: Task) -> dict[str, Results]:
        results = {}
        for method, contestant in self.contestants.items():
            run = self.run(method)
            wanted, measure = task(contestant.encoder)
            if todo := run.missing(wanted):
                with contestant.start() as runner:
                    run.add(measure(runner, todo), self.progress(method, len(todo)))
            results[method] = run.results(wanted)
        return results
