"""The search for DeciMamba's settings by the tasks of `longmamba eval`, where the user asks for one."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from rich.console import Console
from rich.progress import Progress

from vllm_longmamba.calibration.text import sample_corpus
from vllm_longmamba.evaluate.methods import ModelSettings
from vllm_longmamba.evaluate.needles import ANSWER_TOKENS, Question
from vllm_longmamba.evaluate.perplexity import Window, windows
from vllm_longmamba.evaluate.runner import Runner
from vllm_longmamba.evaluate.store import Store, settings_key
from vllm_longmamba.evaluate.texts import Encoder

from .contestant import TorchContestant, TorchRunner
from .mean_distance import mean_distances
from .methods import DeciMamba
from .search import search_decimamba
from .settings import SEARCH

FILE_NAME = "decimamba.json"
# Tokens for the first decimating layer to keep, as shares of the longest prompt.
_BASE_SHARES = (16, 8, 4, 2)
# Mean distances are measured on a text of at most so many tokens.
_DISTANCE_TOKENS = 4096


class SearchTask(Protocol):
    """What the settings are to be good at.

    Attributes:
        longest: tokens of the longest prompt.
        identity: what determines the score, as plain values.
    """

    @property
    def longest(self) -> int: ...

    @property
    def identity(self) -> Any: ...

    def score(self, runner: Runner, encoder: Encoder, text: list[int]) -> float:
        """A larger one is better.

        Args:
            runner: the model with the settings.
            encoder: its tokenizer.
            text: tokens of a text that is not evaluated.
        """


@dataclass(frozen=True)
class QuestionsTask:
    """Numbers found; the questions are other ones than those that are reported."""

    questions: Sequence[Question]

    @property
    def longest(self) -> int:
        return max(question.length for question in self.questions)

    @property
    def identity(self) -> Any:
        return [asdict(question) for question in self.questions]

    def score(self, runner: Runner, encoder: Encoder, text: list[int]) -> float:
        jobs = ((question, encoder.prompt(question, text), ANSWER_TOKENS) for question in self.questions)
        found = [question.found_in(answer) for question, answer in runner.complete(jobs)]
        return sum(found) / len(found)


@dataclass(frozen=True)
class WindowsTask:
    """Mean log-probability of the last tokens of windows.

    Attributes:
        lengths: tokens of the windows.
        number: windows of each length.
        scored: tokens at the end of each.
    """

    lengths: Sequence[int]
    number: int
    scored: int

    @property
    def longest(self) -> int:
        return max(self.lengths)

    @property
    def identity(self) -> Any:
        return asdict(self)

    def score(self, runner: Runner, encoder: Encoder, text: list[int]) -> float:
        places: Iterable[Window] = windows(
            {"": len(encoder.prefix) + len(text)}, self.lengths, self.number, self.scored
        )
        jobs = ((place, place.tokens(text, encoder.prefix)) for place in places)
        means = [float(logprobs.mean()) for _, logprobs in runner.tail_logprobs(jobs, self.scored)]
        return sum(means) / len(means)


def search_settings(settings: ModelSettings, task: SearchTask, store: Store, console: Console) -> dict[str, Any]:
    """Search DeciMamba's settings on the text that comes with the package, as search.py does it.

    Args:
        settings: the model.
        task: what they are to be good at.
        store: keeps them with all that was tried, also in decimamba.json; a second search of the same finds them there.
        console: shows the progress.

    Returns:
        The best.

    Raises:
        ValueError: as from `TorchContestant`, or prompts longer than the text.
    """
    contestant = TorchContestant(settings, "plain")
    corpus, encoder = sample_corpus(), contestant.encoder
    key = settings_key({**contestant.description, "task": task.identity, "text": corpus.name})
    identity = {"task": "search for DeciMamba", "settings": key}
    if identity in store:
        return dict(store.result(identity)["settings"])
    text = encoder.encode("".join(corpus.texts))
    if len(text) < task.longest:
        raise ValueError(
            f"--decimamba {SEARCH}: the text that comes with the package has {len(text)} tokens, but the longest "
            f"prompt {task.longest}; search with shorter --lengths into another folder, and give its {FILE_NAME} here"
        )
    store.check_files([FILE_NAME])
    with contestant.start() as runner, Progress(console=console) as progress:
        distances = mean_distances(runner.model, text[: min(task.longest, _DISTANCE_TOKENS)])

        def score(candidate: DeciMamba) -> float:
            return task.score(TorchRunner(runner.model.with_method(candidate), encoder), encoder, text)

        bases = sorted({max(1, task.longest // share) for share in _BASE_SHARES})
        trials = search_decimamba(score, distances, bases, progress=progress)
    found = {
        "settings": trials[0].settings.to_dict(),
        "trials": [{"settings": trial.settings.to_dict(), "score": trial.score} for trial in trials],
    }
    store.write(FILE_NAME, (json.dumps(found, indent=1) + "\n").encode())
    store.add(identity, found)
    return dict(found["settings"])
