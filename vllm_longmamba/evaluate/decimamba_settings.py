"""Settings of DeciMamba as a user gives them, and the search for them where the user asks for one."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console
from rich.progress import Progress

from vllm_longmamba.calibration.text import sample_corpus
from vllm_longmamba.evaluate.methods import ModelSettings, Runner
from vllm_longmamba.evaluate.needles import Question
from vllm_longmamba.evaluate.perplexity import Window, windows
from vllm_longmamba.evaluate.records import settings_key
from vllm_longmamba.evaluate.texts import Encoder

if TYPE_CHECKING:
    from vllm_longmamba.torch_reference import DeciMamba

SEARCH = "search"
FILE_NAME = "decimamba.json"
_EXAMPLE = """--decimamba '{"layers": [6], "L_base": 2048}'"""
# Tokens for the first decimating layer to keep, as shares of the longest prompt.
_BASE_SHARES = (16, 8, 4, 2)
# Mean distances are measured on a text of at most so many tokens.
_DISTANCE_TOKENS = 4096


def read_decimamba(given: str | None) -> dict[str, Any] | None:
    """The option --decimamba: JSON, or a file of it, such as a search left.

    Returns:
        The settings; None where nothing is given, or a search is asked for.

    Raises:
        ValueError: neither.
    """
    if given is None or given == SEARCH:
        return None
    text = given
    if not given.lstrip().startswith("{"):
        if not Path(given).is_file():
            raise ValueError(f"--decimamba must be JSON, a file of it, or {SEARCH}, got {given!r}; such as {_EXAMPLE}")
        text = Path(given).read_text(encoding="utf-8")
    try:
        settings = json.loads(text)
    except ValueError as error:
        raise ValueError(f"--decimamba: no JSON: {error}; such as {_EXAMPLE}") from None
    settings = settings.get("settings", settings) if isinstance(settings, dict) else settings
    return decimamba_from(settings).to_dict()


def decimamba_from(settings: Mapping[str, Any] | None) -> "DeciMamba":
    """DeciMamba with these settings.

    Raises:
        ValueError: None, a name that it does not know, layers or L_base missing, or a value out of range.
    """
    from vllm_longmamba.torch_reference import DeciMamba

    if settings is None:
        raise ValueError(f"--method decimamba needs settings: {_EXAMPLE}, or --decimamba {SEARCH} to find some")
    names = [field.name for field in fields(DeciMamba)]
    if not isinstance(settings, Mapping) or not {"layers", "L_base"} <= set(settings) <= set(names):
        raise ValueError(
            f"--decimamba: the settings are {', '.join(names)}, the first two are needed; got {settings!r}"
        )
    try:
        return DeciMamba(**settings)
    except TypeError as error:
        raise ValueError(f"--decimamba: {error}, in {dict(settings)!r}; such as {_EXAMPLE}") from None


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
        jobs = ((question, encoder.prompt(question, text), question.max_answer_tokens()) for question in self.questions)
        found = [mark for question, answer in runner.complete(jobs) for mark in question.found_in(answer)]
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


def search_settings(settings: ModelSettings, task: SearchTask, folder: Path, console: Console) -> dict[str, Any]:
    """Search DeciMamba's settings on the text that comes with the package, as torch_reference/search.py does it.

    Args:
        settings: the model.
        task: what they are to be good at.
        folder: keeps them with all that was tried, in decimamba.json; a second search of the same finds them there.
        console: shows the progress.

    Returns:
        The best.

    Raises:
        ValueError: as from `TorchContestant`, or prompts longer than the text.
    """
    from vllm_longmamba.evaluate.torch_contestant import TorchContestant, TorchRunner
    from vllm_longmamba.torch_reference import DeciMamba, mean_distances, search_decimamba

    contestant = TorchContestant(settings, "plain")
    corpus, encoder = sample_corpus(), contestant.encoder
    key = settings_key({**contestant.description, "task": task.identity, "text": corpus.name})
    file = folder / FILE_NAME
    if file.exists():
        stored: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if stored["key"] == key:
            return dict(stored["settings"])
    text = encoder.encode("".join(corpus.texts))
    if len(text) < task.longest:
        raise ValueError(
            f"--decimamba {SEARCH}: the text that comes with the package has {len(text)} tokens, but the longest "
            f"prompt {task.longest}; search with shorter --lengths into another folder, and give its {FILE_NAME} here"
        )
    with contestant.start() as runner, Progress(console=console) as progress:
        distances = mean_distances(runner.model, text[: min(task.longest, _DISTANCE_TOKENS)])

        def score(candidate: DeciMamba) -> float:
            return task.score(TorchRunner(runner.model.with_method(candidate), encoder), encoder, text)

        bases = sorted({max(1, task.longest // share) for share in _BASE_SHARES})
        trials = search_decimamba(score, distances, bases, progress=progress)
    best = trials[0].settings.to_dict()
    report = {
        "key": key,
        "settings": best,
        "trials": [{"settings": trial.settings.to_dict(), "score": trial.score} for trial in trials],
    }
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return best
