"""The search for the budget, theta (`min_retention`) and the unfiltered end that serve a text best."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from blake3 import blake3

from vllm_longmamba.calibration.settings import CalibrationSettings
from vllm_longmamba.evaluate.comparison import Progress, Results, Run, ask, score
from vllm_longmamba.evaluate.engine import EngineRunner
from vllm_longmamba.evaluate.needles import Question, middles, passkey_questions
from vllm_longmamba.evaluate.perplexity import SCORED_TOKENS, Window, windows
from vllm_longmamba.evaluate.report import difference, loss_of, share_of
from vllm_longmamba.evaluate.store import Store, settings_key
from vllm_longmamba.evaluate.texts import Encoder
from vllm_longmamba.tables import (
    DEFAULT_MIN_RETENTION,
    UNCLAMPED,
    ThresholdTable,
    check_range,
    load_table,
)

# Within this much of the most keys found, settings count as equally good at finding them.
FOUND_TOLERANCE = 0.05


@dataclass(frozen=True)
class Setting:
    """A setting to be tried.

    Attributes:
        budget: of the table.
        min_retention: the paper's theta.
        unfiltered_end: as many of a prompt's last tokens are not filtered.
    """

    budget: float
    min_retention: float
    unfiltered_end: int

    def plain(self) -> "Setting":
        """The plain model, by this setting's table: no channel has a retention above 1."""
        return Setting(self.budget, 1.0, 0)

    def label(self) -> str:
        """The setting in words."""
        if self == self.plain():
            return "plain"
        end = f", unfiltered end {self.unfiltered_end}" if self.unfiltered_end else ""
        return f"budget {self.budget:g}, theta {self.min_retention:.3g}{end}"


def default_setting(calibration: CalibrationSettings) -> Setting:
    """What an engine serves with if nothing is tuned; the training length must be known."""
    return Setting(calibration.budget_before_end(), calibration.theta, calibration.end())


@dataclass(frozen=True)
class Space:
    """The settings to be searched.

    Attributes:
        budgets: each takes a calibration.
        thetas: the smallest and the largest `min_retention`.
        unfiltered_ends: in tokens.
        trials: number of settings to try.

    Raises:
        ValueError: a value outside its range.
    """

    budgets: Sequence[float]
    thetas: Sequence[float]
    unfiltered_ends: Sequence[int]
    trials: int

    def __post_init__(self) -> None:
        for budget in self.budgets:
            check_range("budget", budget, "--budgets")
        for end in self.unfiltered_ends:
            check_range("unfiltered_end", end, "--unfiltered-ends")
        theta = DEFAULT_MIN_RETENTION[UNCLAMPED]
        if len(self.thetas) != 2 or not 0 < self.thetas[0] <= theta <= self.thetas[1] < 1:
            raise ValueError(
                f"--thetas must be the smallest and the largest, between 0 and 1, with the default "
                f"{theta:g} between them, got {', '.join(map(str, self.thetas))}"
            )

    def including(self, default: Setting) -> "Space":
        """The space with a setting's budget and unfiltered end in it, in the first places."""
        return replace(
            self,
            budgets=tuple(dict.fromkeys([default.budget, *self.budgets])),
            unfiltered_ends=tuple(dict.fromkeys([default.unfiltered_end, *self.unfiltered_ends])),
        )


@dataclass(frozen=True)
class Score:
    """What a setting reached.

    Attributes:
        setting: the setting.
        global_channels: channels that it filters, in all layers.
        found: share of the keys found, over all lengths: share, low, high.
        loss: of all windows: loss in nats per token, low, high.
        difference: loss less that of the plain model, window by window: loss, low, high.
    """

    setting: Setting
    global_channels: int
    found: Mapping[str, float]
    loss: Mapping[str, float]
    difference: Mapping[str, float]


@dataclass(frozen=True)
class Part:
    """A part of the texts, and what is asked of it.

    Attributes:
        name: tells its results from those of others.
        books: tokens of each text.
        questions: pass keys that are hidden in them.
        windows: of text.
    """

    name: str
    books: Mapping[str, list[int]]
    questions: Sequence[Question]
    windows: Sequence[Window]

    @property
    def haystack(self) -> list[int]:
        """Tokens of all texts."""
        return [token for book in self.books.values() for token in book]


def halves(
    books: Mapping[str, list[int]], encoder: Encoder, lengths: list[int], depths: int, number: int
) -> tuple[Part, Part]:
    """The first half of each text, to search on, and the second half, to judge by.

    Args:
        books: tokens of each text.
        encoder: the tokenizer.
        lengths: tokens of prompts and windows.
        depths: number of pass keys of each length.
        number: at most so many windows of each length in each text.

    Raises:
        ValueError: too little text.
    """

    def part(name: str, books: Mapping[str, list[int]]) -> Part:
        questions = list(passkey_questions(lengths, middles(depths), [0]))
        made = Part(name, books, questions, list(windows(encoder.sizes(books), lengths, number)))
        encoder.check_room(questions, made.haystack)
        return made

    first = {name: tokens[: len(tokens) // 2] for name, tokens in books.items()}
    second = {name: tokens[len(tokens) // 2 :] for name, tokens in books.items()}
    return part("first", first), part("second", second)


@dataclass(frozen=True)
class Scorer:
    """Scores settings on one engine.

    Attributes:
        runner: the engine, started with `FILTER_EXTENSION`.
        encoder: the model's tokenizer.
        tables: budget -> the file of its table.
        settings: of the model and its texts; with a setting's thresholds they tell its results from others.
        store: takes the results.
        progress: shows it.
    """

    runner: EngineRunner
    encoder: Encoder
    tables: Mapping[float, Path]
    settings: Mapping[str, Any]
    store: Store
    progress: Progress

    def score(self, setting: Setting, part: Part) -> Score:
        """Score a setting, or take its score from the store. The plain model's is taken along for comparison."""
        answers, losses = self._results(setting, part)
        return Score(
            setting=setting,
            global_channels=load_table(self.tables[setting.budget]).count_global(setting.min_retention),
            found=share_of([float(result["found"]) for _, result in answers]),
            loss=loss_of(losses),
            difference=difference(losses, self._results(setting.plain(), part)[1]),
        )

    def _results(self, setting: Setting, part: Part) -> tuple[Results, Results]:
        path = self.tables[setting.budget]
        known = {**self.settings, "part": part.name, "thresholds": in_force(load_table(path), setting)}
        run = Run(self.store, "tune", settings_key(known))
        if todo := len(run.missing([*part.questions, *part.windows])):
            self.runner.set_filter(path, setting.min_retention, setting.unfiltered_end)
            advance = self.progress(setting.label(), todo)
            questions, scored = run.missing(part.questions), run.missing(part.windows)
            run.add(ask(self.runner, self.encoder, questions, part.haystack), advance)
            run.add(score(self.runner, self.encoder, scored, part.books, SCORED_TOKENS), advance)
        return run.results(part.questions), run.results(part.windows)


def in_force(table: ThresholdTable, setting: Setting) -> str:
    """32 hexadecimal digits that stand for the thresholds in force: settings that share them are the same model."""
    digest = blake3(f"unfiltered_end {setting.unfiltered_end}".encode())
    for layer in sorted(table.layers):
        digest.update(table.thresholds(layer, setting.min_retention).numpy().tobytes())
    return str(digest.hexdigest()[:32])


def choose(scores: Sequence[Score]) -> Score:
    """The best setting: of those that find about as many keys as the best one, that of the smallest loss.

    About as many: at most `FOUND_TOLERANCE` less, which a few questions do not tell apart. Of equal ones it is the
    first.
    """
    most = max(score.found["share"] for score in scores)
    good = [score for score in scores if score.found["share"] >= most - FOUND_TOLERANCE]
    return min(good, key=lambda score: score.loss["loss"])


def search(score: Callable[[Setting], Score], space: Space, default: Setting) -> list[Score]:
    """Score the plain model, every budget with every unfiltered end, and then what optuna proposes from these scores.

    The same scores lead to the same proposals: where scores are kept, an interrupted search goes on by itself.

    Args:
        score: scores a setting.
        space: what to search, including the default.
        default: is scored first.

    Returns:
        The scores, the plain model's first, then the default's.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=optuna.samplers.TPESampler(seed=0))
    for end, budget in product(space.unfiltered_ends, space.budgets):
        study.enqueue_trial({"budget": budget, "min_retention": default.min_retention, "unfiltered_end": end})
    plain = default.plain()
    scores = {plain: score(plain)}
    for _ in range(space.trials):
        trial = study.ask()
        setting = Setting(
            budget=trial.suggest_categorical("budget", space.budgets),
            min_retention=trial.suggest_float("min_retention", *space.thetas, log=True),
            unfiltered_end=trial.suggest_categorical("unfiltered_end", space.unfiltered_ends),
        )
        scores[setting] = score(setting)
        study.tell(trial, (scores[setting].found["share"], scores[setting].loss["loss"]))
    return list(scores.values())


def calibrations(
    budgets: Sequence[float], settings: CalibrationSettings, description: Mapping[str, Any], folder: Path
) -> list[CalibrationSettings]:
    """How an engine makes a table for each budget at its start; it takes what an earlier one has left in the folder.

    Args:
        budgets: see `Space`.
        settings: of every calibration, but for the budget.
        description: of the model; with all settings of a calibration it tells its table from others.
        folder: keeps the tables; the engine makes it, so that nobody else can enter, and trusts what lies there.
    """
    digests = {path: blake3(Path(path).read_bytes()).hexdigest() for path in settings.texts}
    key = settings_key({**description, **asdict(settings), "texts": digests})
    return [
        replace(settings, budget=budget, store=str((folder / f"budget{budget:g}-{key}.safetensors").absolute()))
        for budget in budgets
    ]
