"""Runs `longmamba tune`: the tables, one engine for all settings, and the table of the best."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vllm_longmamba.calibration.offline import find_train_length
from vllm_longmamba.evaluate.comparison import Progress
from vllm_longmamba.evaluate.engine import EngineContestant
from vllm_longmamba.evaluate.needles import (
    NEEDLE,
    ONE_QUESTION,
    PASSKEY_NEEDLE,
    PASSKEY_QUESTION,
    Question,
    middles,
    needle_questions,
    passkey_questions,
)
from vllm_longmamba.evaluate.perplexity import Window, windows
from vllm_longmamba.evaluate.records import Records
from vllm_longmamba.evaluate.texts import Encoder
from vllm_longmamba.evaluate.tuning import EXTENSION, Score, Trial, choose, plain, search, table_of
from vllm_longmamba.evaluate.tuning_settings import TuningSettings
from vllm_longmamba.evaluate.tuning_tables import TableMaker, calibration_arguments
from vllm_longmamba.evaluate.tuning_unfiltered import search_unfiltered
from vllm_longmamba.tables import ThresholdTable, leave_unfiltered


@dataclass(frozen=True)
class TuningResult:
    """What `tune_model` found.

    Attributes:
        scores: of all settings tried, the plain model's first.
        best: the best of them.
        table: the best setting's table, whose metadata have the best theta as default.
        contestant: the plain model.
        lengths: tokens of prompts and windows.
    """

    scores: list[Score]
    best: Score
    table: ThresholdTable
    contestant: EngineContestant
    lengths: list[int]


def tune_model(
    model: str, settings: TuningSettings, engine_args: Mapping[str, Any], folder: Path, progress: Progress
) -> TuningResult:
    """Search theta and C, or the closed loop's theta, and the budget, for a model.

    Args:
        model: name or folder, as for `vllm serve`.
        settings: what is searched, and on what.
        engine_args: further arguments of vLLM's `LLM`.
        folder: keeps tables and records, from which a second run goes on.
        progress: shows the progress.

    Raises:
        ValueError: too little text to calibrate on, to hide keys in or to score.
    """
    contestant = EngineContestant(model, {"filter": False}, engine_args)
    encoder = contestant.encoder
    books = {book.name: encoder.encode(book.text) for book in settings.held_out}
    lengths = settings.lengths_for(find_train_length(model, settings.calibration, calibration_arguments(engine_args)))
    # Before the calibrations: too little text is said at once.
    questions, to_score = _tasks(settings, lengths, encoder, books)
    longest = max([max(lengths) + 1, *(one.length + one.max_answer_tokens() for one in questions)])
    tables = TableMaker(model, settings, engine_args, contestant.description, folder, progress).make(max(lengths))
    filtering = EngineContestant(model, {"table": str(tables[0].path)}, {"max_model_len": longest, **engine_args})
    records = Records(folder / "records.jsonl")
    try:
        with filtering.start(worker_extension_cls=EXTENSION) as runner:
            trial = Trial(
                runner=runner,
                encoder=encoder,
                folder=folder,
                plain=plain(tables[0]),
                questions=questions,
                haystack=[token for book in books.values() for token in book],
                windows=to_score,
                books=books,
                scored=settings.scored_tokens,
                settings={**contestant.description, **_task_settings(settings)},
                records=records,
                progress=progress,
            )
            scores = search(trial.score, tables, settings.grid.refine)
            if settings.search_unfiltered:
                best = choose(scores[1:])
                tried = table_of(best.candidate, tables)
                scores += search_unfiltered(trial.score, replace(trial, questions=[]).score, tried, best)
    finally:
        records.close()
    best = choose(scores[1:])
    table = leave_unfiltered(table_of(best.candidate, tables).table, best.candidate.unfiltered)
    table = replace(table, metadata=replace(table.metadata, min_retention=best.candidate.min_retention))
    return TuningResult(scores, best, table, contestant, lengths)


def _task_settings(settings: TuningSettings) -> dict[str, Any]:
    given: dict[str, Any] = {
        "held_out": {book.name: book.digest for book in settings.held_out},
        "scored_tokens": settings.scored_tokens,
        "wording": [PASSKEY_NEEDLE, PASSKEY_QUESTION],
    }
    if settings.needles:
        given |= {"needles": settings.needles, "wording of needles": [NEEDLE, ONE_QUESTION]}
    return given


def _tasks(
    settings: TuningSettings, lengths: Sequence[int], encoder: Encoder, books: Mapping[str, list[int]]
) -> tuple[list[Question], list[Window]]:
    questions: list[Question] = []
    if settings.passkeys:
        places = middles(settings.depths)
        questions = list(passkey_questions(lengths, places, settings.seeds))
        if settings.needles:
            questions += needle_questions(lengths, places, settings.seeds, settings.needles)
        haystack = [token for book in books.values() for token in book]
        for length in (min(lengths), max(lengths)):
            encoder.prompt(next(one for one in questions if one.length == length), haystack)
    to_score: list[Window] = []
    if settings.perplexity:
        sizes = {name: len(encoder.prefix) + len(book) for name, book in books.items()}
        to_score = list(windows(sizes, lengths, settings.windows, settings.scored_tokens))
    return questions, to_score
