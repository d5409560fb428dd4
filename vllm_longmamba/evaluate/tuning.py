"""The search for theta (`min_retention`), C (`clamp_percent`), the budget and the unfiltered end, on held-out text."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from vllm_longmamba.evaluate.comparison import Progress
from vllm_longmamba.evaluate.engine import EngineRunner
from vllm_longmamba.evaluate.needles import Question
from vllm_longmamba.evaluate.perplexity import Loss, Window
from vllm_longmamba.evaluate.records import Records, settings_key
from vllm_longmamba.evaluate.report import difference, loss_of, share_of, summarize_perplexity, summarize_questions
from vllm_longmamba.evaluate.runs import ask_questions, question_identity, score_windows, window_identity
from vllm_longmamba.evaluate.texts import Encoder
from vllm_longmamba.tables import ThresholdTable, leave_unfiltered

EXTENSION = "vllm_longmamba.evaluate.tuning_worker.TuningWorkerExtension"
# Within this much of the most keys found, settings count as equally good at finding them.
FOUND_TOLERANCE = 0.05
_PLAIN = 1.0


@dataclass(frozen=True)
class TriedTable:
    """A table to be tried.

    Attributes:
        path: its file.
        table: its contents.
        thetas: to be tried with it.
    """

    path: Path
    table: ThresholdTable
    thetas: Sequence[float]


@dataclass(frozen=True)
class Candidate:
    """A setting to be tried.

    Attributes:
        clamp_percent: the paper's C, of the table; None where the closed loop made it.
        budget: of the table; 1 is that of the paper.
        min_retention: the paper's theta; 1 is the plain model.
        global_channels: channels that it filters, in all layers.
        thresholds: stands for the thresholds in force; settings that share it are the same model.
        table: name of the table's file.
        unfiltered: global channels that it leaves unfiltered; names as in `leave_unfiltered`.
        unfiltered_end: as many of a prompt's last tokens are not filtered.
    """

    clamp_percent: float | None
    budget: float
    min_retention: float
    global_channels: int
    thresholds: str
    table: str
    unfiltered: tuple[str, ...] = ()
    unfiltered_end: int = 0

    @property
    def is_plain(self) -> bool:
        """Whether nothing is filtered by intention, for comparison."""
        return self.min_retention == _PLAIN

    def label(self) -> str:
        """The setting in words."""
        if self.is_plain:
            return "plain"
        names = [f"C {self.clamp_percent:g}"] if self.clamp_percent is not None else []
        if self.budget != 1 or not names:
            names.append(f"budget {self.budget:g}")
        if self.unfiltered_end:
            names.append(f"unfiltered end {self.unfiltered_end}")
        left_out = f", without {', '.join(self.unfiltered)}" if self.unfiltered else ""
        return f"{', '.join(names)}, theta {self.min_retention:.3g}{left_out}"


@dataclass(frozen=True)
class Score:
    """What a candidate reached.

    Attributes:
        candidate: the setting.
        found: share of the keys found, over all lengths: share, low, high; None where none were asked for.
        loss: of all windows: loss in nats per token, low, high; None where no text was scored.
        difference: loss less that of the plain model, window by window: loss, low, high; likewise.
        by_length: the rows of the reports of `longmamba eval`, for each task.
    """

    candidate: Candidate
    found: Mapping[str, float] | None
    loss: Mapping[str, float] | None
    difference: Mapping[str, float] | None
    by_length: Mapping[str, Any]


def candidate(tried: TriedTable, min_retention: float, unfiltered: Sequence[str] = ()) -> Candidate:
    """The setting of a table, a theta and what is left unfiltered."""
    table, metadata = leave_unfiltered(tried.table, unfiltered), tried.table.metadata
    digest = blake3()
    if metadata.unfiltered_end:
        digest.update(f"unfiltered_end {metadata.unfiltered_end}".encode())
    for layer in sorted(table.layers):
        digest.update(table.thresholds(layer, min_retention).numpy().tobytes())
    closed = metadata.closed_loop
    return Candidate(
        clamp_percent=metadata.clamp_percent if closed is None else None,
        budget=closed.budget if closed is not None else metadata.budget,
        min_retention=min_retention,
        global_channels=table.count_global(min_retention),
        thresholds=str(digest.hexdigest()[:32]),
        table=tried.path.name,
        unfiltered=tuple(unfiltered),
        unfiltered_end=metadata.unfiltered_end,
    )


def table_of(setting: Candidate, tables: Sequence[TriedTable]) -> TriedTable:
    """The table that a setting was made of."""
    return next(one for one in tables if one.path.name == setting.table)


def plain(tried: TriedTable) -> Candidate:
    """The setting that filters nothing."""
    return candidate(tried, _PLAIN)


@dataclass
class Trial:
    """Scores candidates on one engine.

    Attributes:
        runner: the engine, started with `EXTENSION`.
        encoder: the model's tokenizer.
        folder: of the tables.
        plain: the setting that filters nothing.
        questions: pass keys and needles; none for perplexity alone.
        haystack: tokens of the text that hides them.
        windows: windows of text; none for passkeys alone.
        books: tokens of the texts.
        scored: tokens to score at a window's end.
        settings: of model and tasks; with a candidate's thresholds they tell its results from others.
        records: takes the results.
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
    records: Records
    progress: Progress

    def score(self, setting: Candidate) -> Score:
        """Score a setting, or take its score from the records. The plain model's is taken along for comparison."""
        answers, losses = self._run(setting)
        by_length: dict[str, Any] = {}
        if answers:
            by_length["passkey"] = summarize_questions({"tune": answers})["by_length"]
        if losses:
            by_length["perplexity"] = summarize_perplexity({"tune": losses})["by_length"]
        return Score(
            candidate=setting,
            found=share_of([float(result["found"][0]) for _, result in answers]) if answers else None,
            loss=loss_of(losses) if losses else None,
            difference=difference(losses, self._run(self.plain)[1]) if losses else None,
            by_length=by_length,
        )

    def _run(self, setting: Candidate) -> tuple[list[tuple[Question, dict[str, Any]]], list[tuple[Window, Loss]]]:
        run = {"method": "tune", "settings": settings_key({**self.settings, "thresholds": setting.thresholds})}
        questions = [one for one in self.questions if question_identity(one, run) not in self.records]
        windows = [one for one in self.windows if window_identity(one, run) not in self.records]
        if questions or windows:
            table = self.folder / setting.table
            given = (str(table), setting.min_retention, list(setting.unfiltered))
            self.runner.llm.collective_rpc("longmamba_set_filter", args=given)
            advance = self.progress(setting.label(), len(questions) + len(windows))
            ask_questions(self.runner, self.encoder, questions, self.haystack, self.records, run, advance)
            score_windows(self.runner, self.encoder, windows, self.books, self.scored, self.records, run, advance)
        answers = [(one, self.records.result(question_identity(one, run))) for one in self.questions]
        losses = [(one, Loss(**self.records.result(window_identity(one, run)))) for one in self.windows]
        return answers, losses


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


def between_neighbours(best: float, tried: Sequence[float]) -> list[float]:
    """Thetas half way, in the exponent, between the best one and its neighbours: the next, finer grid."""
    below = max((theta for theta in tried if theta < best), default=None)
    above = min((theta for theta in tried if best < theta < _PLAIN), default=None)
    return [math.sqrt(best * other) for other in (below, above) if other is not None]


def search(score: Callable[[Candidate], Score], tables: Sequence[TriedTable], refine: int) -> list[Score]:
    """Score the plain model, every table with its thetas, and then finer grids around the best so far.

    Args:
        score: scores a setting.
        tables: the tables and their thetas.
        refine: finer grids, each of up to two thetas with the best table so far.

    Returns:
        All scores, the plain model's first.
    """
    scores = [score(plain(tables[0]))]
    scores += [score(candidate(one, theta)) for one in tables for theta in one.thetas]
    tried = sorted({theta for one in tables for theta in one.thetas})
    for _ in range(refine):
        best = choose(scores[1:]).candidate
        table = table_of(best, tables)
        finer = between_neighbours(best.min_retention, tried)
        scores += [score(candidate(table, theta)) for theta in finer]
        tried = sorted({*tried, *finer})
    return scores
