"""Runs a task with one method after the other; one engine at a time, and none where all results are there."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vllm_longmamba.evaluate.needles import ANSWER_TOKENS, Question
from vllm_longmamba.evaluate.perplexity import Loss, Window
from vllm_longmamba.evaluate.runner import Contestant, Runner
from vllm_longmamba.evaluate.store import Store, settings_key
from vllm_longmamba.evaluate.texts import Book, Encoder

# Called with what begins and the number of its steps; returns what to call after each step.
Progress = Callable[[str, int], Callable[[], None]]
Answers = list[tuple[Question, dict[str, Any]]]
Losses = list[tuple[Window, Loss]]


@dataclass(frozen=True)
class Run:
    """One model's results in a store; what is there already is not measured again.

    Attributes:
        store: takes the results.
        name: of the method.
        key: of the model's description and the task's settings.
    """

    store: Store
    name: str
    key: str

    def _identity(self, of: Question | Window) -> dict[str, Any]:
        run = {"method": self.name, "settings": self.key}
        if isinstance(of, Window):
            return {**run, "task": "perplexity", **asdict(of)}
        return {**run, "task": of.task, "length": of.length, "depth": of.depth, "seed": of.seed}

    def missing(self, all_of_them: Iterable[Any]) -> list[Any]:
        """The questions or windows that have no result yet."""
        return [one for one in all_of_them if self._identity(one) not in self.store]

    def answers(self, questions: Iterable[Question]) -> Answers:
        """Questions and what became of them: "asked", "answer" and "found"."""
        return [(question, self.store.result(self._identity(question))) for question in questions]

    def losses(self, windows: Iterable[Window]) -> Losses:
        """Windows and their losses."""
        return [(window, Loss(**self.store.result(self._identity(window)))) for window in windows]

    def ask(
        self,
        runner: Runner,
        encoder: Encoder,
        questions: Iterable[Question],
        haystack: list[int],
        advance: Callable[[], None],
    ) -> None:
        """Ask a model the questions that have no answer yet.

        Args:
            runner: the model.
            encoder: its tokenizer.
            questions: the questions.
            haystack: tokens of the text to hide the needles in.
            advance: called after each answer.

        Raises:
            ValueError: too short a haystack, or too short a length.
        """

        def jobs() -> Iterator[tuple[Question, list[int], int]]:
            for question in self.missing(questions):
                yield question, encoder.prompt(question, haystack), ANSWER_TOKENS

        for question, answer in runner.complete(jobs()):
            result = {"asked": question.asked.number, "answer": answer, "found": question.found_in(answer)}
            self.store.add(self._identity(question), result)
            advance()

    def score(
        self,
        runner: Runner,
        encoder: Encoder,
        windows: Iterable[Window],
        books: Mapping[str, list[int]],
        scored: int,
        advance: Callable[[], None],
    ) -> None:
        """Score the windows that have no loss yet; arguments as above.

        Args:
            books: tokens of each book.
            scored: tokens to score at a window's end.
        """

        def tokens_of(window: Window) -> list[int]:
            return window.tokens(books[window.book], encoder.prefix)

        jobs = ((window, tokens_of(window)) for window in self.missing(windows))
        for window, logprobs in runner.tail_logprobs(jobs, scored):
            text = encoder.decode(tokens_of(window)[-scored:])
            loss = Loss(nats=-float(logprobs.sum()), tokens=scored, bytes=len(text.encode()))
            self.store.add(self._identity(window), asdict(loss))
            advance()


@dataclass(frozen=True)
class Comparison:
    """Methods side by side on one model.

    Attributes:
        contestants: method -> model, not yet started.
        settings: of the task; with a contestant's description they tell its results from others.
        store: takes the results.
        progress: shows it.
    """

    contestants: Mapping[str, Contestant]
    settings: Mapping[str, Any]
    store: Store
    progress: Progress

    def _run(self, method: str) -> Run:
        return Run(self.store, method, settings_key({**self.contestants[method].description, **self.settings}))

    def ask(self, questions: Sequence[Question], haystack: Iterable[Book]) -> dict[str, Answers]:
        """Ask every contestant all questions.

        Returns:
            Method -> the questions and what became of them.

        Raises:
            ValueError: too short a haystack or length; nothing was started then.
        """
        text = "".join(book.text for book in haystack)
        answers: dict[str, Answers] = {}
        for method, contestant in self.contestants.items():
            run = self._run(method)
            if todo := run.missing(questions):
                encoder = contestant.encoder
                tokens = encoder.encode(text)
                for question in (min(todo, key=lambda one: one.length), max(todo, key=lambda one: one.length)):
                    encoder.prompt(question, tokens)
                with contestant.start() as runner:
                    run.ask(runner, encoder, todo, tokens, self.progress(method, len(todo)))
            answers[method] = run.answers(questions)
        return answers

    def score(
        self, books: Iterable[Book], choose: Callable[[Mapping[str, int]], Iterable[Window]], scored: int
    ) -> dict[str, Losses]:
        """Score the end of windows with every contestant.

        Args:
            books: the texts.
            choose: the windows, from the number of tokens of each book.
            scored: tokens to score.

        Returns:
            Method -> the windows and their losses.
        """
        texts = list(books)
        losses: dict[str, Losses] = {}
        for method, contestant in self.contestants.items():
            run, encoder = self._run(method), contestant.encoder
            tokens = {book.name: encoder.encode(book.text) for book in texts}
            windows = list(choose({name: len(book) + len(encoder.prefix) for name, book in tokens.items()}))
            if todo := run.missing(windows):
                with contestant.start() as runner:
                    run.score(runner, encoder, todo, tokens, scored, self.progress(method, len(todo)))
            losses[method] = run.losses(windows)
        return losses
