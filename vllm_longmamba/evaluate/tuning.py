"""The search for theta (`min_retention`), C (`clamp_percent`), the budget and the unfiltered end, on held-out text."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from vllm_longmamba.evaluate.comparison import Answers, Losses, Progress, Run
from vllm_longmamba.evaluate.engine import EngineRunner
from vllm_longmamba.evaluate.needles import Question
from vllm_longmamba.evaluate.perplexity import Window
from vllm_longmamba.evaluate.report import difference, loss_of, share_of
from vllm_longmamba.evaluate.store import Store, own_database, settings_key
from vllm_longmamba.evaluate.texts import Encoder
from vllm_longmamba.evaluate.tuning_tables import Grid, TriedTable
from vllm_longmamba.tables import ThresholdTable, filtered_channels, leave_unfiltered

STUDY = "tuning.sqlite"
# Within this much of the most keys found, settings count as equally good at finding them.
FOUND_TOLERANCE = 0.05
# Up to so many global channels are left unfiltered one by one (heads of Mamba-2), more of them (Mamba-1) by layers.
MOST_SINGLE = 512
_PLAIN = 1.0


@dataclass(frozen=True)
class Candidate:
    """A setting to be tried.

    Attributes:
        table: name of the table's file.
        clamp_percent: the paper's C, of the table; None where the closed loop made it.
        budget: of the table; 1 is that of the paper.
        unfiltered_end: as many of a prompt's last tokens are not filtered.
        min_retention: the paper's theta; 1 is the plain model.
        unfiltered: global channels that it leaves unfiltered; names as in `leave_unfiltered`.
        global_channels: channels that it filters, in all layers.
        thresholds: stands for the thresholds in force; settings that share it are the same model.
    """

    table: str
    clamp_percent: float | None
    budget: float
    unfiltered_end: int
    min_retention: float
    unfiltered: tuple[str, ...]
    global_channels: int
    thresholds: str

    def label(self) -> str:
        """The setting in words."""
        if self.min_retention == _PLAIN:
            return "plain"
        names = [f"C {self.clamp_percent:g}"] if self.clamp_percent is not None else []
        if self.budget != 1 or not names:
            names.append(f"budget {self.budget:g}")
        if self.unfiltered_end:
            names.append(f"unfiltered end {self.unfiltered_end}")
        left_out = f", without {', '.join(self.unfiltered)}" if self.unfiltered else ""
        return f"{', '.join(names)}, theta {self.min_retention:.3g}{left_out}"


def candidate(
    tried: TriedTable, min_retention: float, unfiltered_end: int = 0, unfiltered: Sequence[str] = ()
) -> Candidate:
    """The setting of a table, a theta, an end and what is left unfiltered."""
    table, metadata = leave_unfiltered(tried.table, unfiltered), tried.table.metadata
    digest = blake3(f"unfiltered_end {unfiltered_end}".encode())
    for layer in sorted(table.layers):
        digest.update(table.thresholds(layer, min_retention).numpy().tobytes())
    closed = metadata.closed_loop
    return Candidate(
        table=tried.path.name,
        clamp_percent=metadata.clamp_percent if closed is None else None,
        budget=closed.budget if closed is not None else metadata.budget,
        unfiltered_end=unfiltered_end,
        min_retention=min_retention,
        unfiltered=tuple(unfiltered),
        global_channels=table.count_global(min_retention),
        thresholds=str(digest.hexdigest()[:32]),
    )


def plain(tables: Sequence[TriedTable]) -> Candidate:
    """The setting that filters nothing: no channel has a retention above 1."""
    return candidate(tables[0], _PLAIN)


@dataclass(frozen=True)
class Score:
    """What a candidate reached.

    Attributes:
        candidate: the setting.
        found: share of the keys found, over all lengths: share, low, high; None where none were asked for.
        loss: of all windows: loss in nats per token, low, high; None where no text was scored.
        difference: loss less that of the plain model, window by window: loss, low, high; likewise.
    """

    candidate: Candidate
    found: Mapping[str, float] | None
    loss: Mapping[str, float] | None
    difference: Mapping[str, float] | None


@dataclass(frozen=True)
class Scorer:
    """Scores candidates on one engine.

    Attributes:
        runner: the engine, started with `FILTER_EXTENSION`.
        encoder: the model's tokenizer.
        folder: of the tables.
        plain: the setting that filters nothing.
        questions: pass keys and needles; none for perplexity alone.
        haystack: tokens of the text that hides them.
        windows: windows of text; none for passkeys alone.
        books: tokens of the texts.
        scored: tokens to score at a window's end.
        settings: of model and tasks; with a candidate's thresholds they tell its results from others.
        store: takes the results.
        progress: shows it.
    """

    runner: EngineRunner
    encoder: Encoder
    folder: Path
    plain: Candidate
    questions: Sequence[Question]
    haystack: list[int]
    windows: Sequence[Window]
    books: Mapping[str, list[int]]
    scored: int
    settings: Mapping[str, Any]
    store: Store
    progress: Progress

    def score(self, setting: Candidate) -> Score:
        """Score a setting, or take its score from the store. The plain model's is taken along for comparison."""
        answers, losses = self._results(setting)
        return Score(
            candidate=setting,
            found=share_of([float(result["found"]) for _, result in answers]) if answers else None,
            loss=loss_of(losses) if losses else None,
            difference=difference(losses, self._results(self.plain)[1]) if losses else None,
        )

    def _results(self, setting: Candidate) -> tuple[Answers, Losses]:
        run = Run(self.store, "tune", settings_key({**self.settings, "thresholds": setting.thresholds}))
        if todo := len(run.missing([*self.questions, *self.windows])):
            table = self.folder / setting.table
            self.runner.set_filter(table, setting.min_retention, setting.unfiltered, setting.unfiltered_end)
            advance = self.progress(setting.label(), todo)
            run.ask(self.runner, self.encoder, self.questions, self.haystack, advance)
            run.score(self.runner, self.encoder, self.windows, self.books, self.scored, advance)
        return run.answers(self.questions), run.losses(self.windows)


def choose(scores: Sequence[Score]) -> Score:
    """The best setting: of those that find about as many keys as the best one, that of the smallest loss.

    About as many: at most `FOUND_TOLERANCE` less, which a few questions do not tell apart. Without keys it is the
    smallest loss, and without text the most keys found, of several the largest theta (the fewest channels filtered).
    """
    most = max((score.found["share"] for score in scores if score.found is not None), default=0.0)
    good = [score for score in scores if score.found is None or score.found["share"] >= most - FOUND_TOLERANCE]

    def rank(score: Score) -> tuple[float, float, float]:
        loss = score.loss["loss"] if score.loss is not None else 0.0
        share = score.found["share"] if score.found is not None else 0.0
        return loss, -share, -score.candidate.min_retention

    return min(good, key=rank)


def search(
    score: Callable[[Candidate], Score], tables: Sequence[TriedTable], grid: Grid, folder: Path, key: str
) -> list[Score]:
    """Score the plain model, every setting of a grid, and then those that optuna proposes beside them.

    Args:
        score: scores a setting.
        tables: the tables and their thetas.
        grid: the unfiltered ends to try with each, and how many further settings.
        folder: keeps optuna's study in tuning.sqlite, with which a second search goes on.
        key: stands for all that determines the scores.

    Returns:
        All scores, the plain model's first.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    by_name = {one.path.name: one for one in tables}
    thetas = [theta for one in tables for theta in one.thetas]
    space: dict[str, optuna.distributions.BaseDistribution] = {
        "table": optuna.distributions.CategoricalDistribution(list(by_name)),
        "min_retention": optuna.distributions.FloatDistribution(min(thetas), max(thetas), log=True),
        "unfiltered_end": optuna.distributions.CategoricalDistribution(list(grid.unfiltered_ends)),
    }
    scores = {plain(tables): score(plain(tables))}
    # What was scored, its number in the rows of a report, and what of it is better.
    kinds = [
        ("found", "share", optuna.study.StudyDirection.MAXIMIZE),
        ("loss", "loss", optuna.study.StudyDirection.MINIMIZE),
    ]
    kinds = [kind for kind in kinds if getattr(scores[plain(tables)], kind[0]) is not None]

    def values_of(parameters: Mapping[str, Any]) -> list[float]:
        setting = candidate(by_name[parameters["table"]], parameters["min_retention"], parameters["unfiltered_end"])
        scores[setting] = score(setting)
        return [getattr(scores[setting], kind)[number] for kind, number, _ in kinds]

    points = [
        {"table": one.path.name, "min_retention": theta, "unfiltered_end": end}
        for one in tables
        for end in grid.unfiltered_ends
        for theta in one.thetas
    ]
    own_database(folder / STUDY).close()
    study = optuna.create_study(
        # Another grid is another study, whose scores are in the store as far as they were tried.
        study_name=settings_key({"key": key, "points": points}),
        storage=f"sqlite:///{folder / STUDY}",
        directions=[direction for *_, direction in kinds],
        load_if_exists=True,
    )
    done = [trial.params for trial in study.get_trials(states=[optuna.trial.TrialState.COMPLETE])]
    for point in points:
        values = values_of(point)
        if point not in done:
            study.add_trial(optuna.trial.create_trial(params=point, distributions=space, values=values))
    proposed = [parameters for parameters in done if parameters not in points]
    for parameters in proposed:
        values_of(parameters)
    for number in range(len(proposed), grid.further or 0):
        # An interrupted search draws as one that was not.
        study.sampler = optuna.samplers.TPESampler(seed=number)
        trial = study.ask(space)
        study.tell(trial, values_of(trial.params))
    return list(scores.values())


def search_unfiltered(
    score: Callable[[Candidate], Score], score_text: Callable[[Candidate], Score], tried: TriedTable, best: Score
) -> list[Score]:
    """Leave out global channels whose filter costs text: each by itself, then the 1, 2, 4, 8 ... most costly together.

    A head of a late layer may remember far back and yet serve the prediction of the next tokens; the filter takes from
    it what was just read (docs/closed_loop.md).

    Args:
        score: scores a setting, by keys and text.
        score_text: scores a setting by text alone.
        tried: the table of the best setting so far.
        best: its score, which must have a loss.

    Returns:
        The scores of the parts left out together; none where no part costs anything.
    """
    assert best.loss is not None, "the search for unfiltered channels goes by the loss of text"
    setting = best.candidate

    def without(parts: Sequence[str]) -> Candidate:
        return candidate(tried, setting.min_retention, setting.unfiltered_end, parts)

    gains = {}
    for part in parts_of(tried.table, setting.min_retention):
        loss = score_text(without([part])).loss
        assert loss is not None
        gains[part] = best.loss["loss"] - loss["loss"]
    costly = sorted((part for part in gains if gains[part] > 0), key=lambda part: -gains[part])
    sizes = sorted({len(costly), *(2**power for power in range(len(costly).bit_length()))} - {0})
    return [score(without(costly[:size])) for size in sizes]


def parts_of(table: ThresholdTable, min_retention: float) -> list[str]:
    """What can be left unfiltered by itself: names as in `leave_unfiltered`."""
    filtered = filtered_channels(table, min_retention)
    if table.count_global(min_retention) > MOST_SINGLE:
        return [str(layer) for layer in filtered]
    return [f"{layer}.{channel}" for layer, channels in filtered.items() for channel in channels]


def as_values(score: Score) -> dict[str, Any]:
    """As JSON has it."""
    values = asdict(score)
    values["candidate"]["unfiltered"] = list(score.candidate.unfiltered)
    return values
