"""Runs `longmamba tune`: a table for each C, one engine for all settings, and the table of the best."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from blake3 import blake3

from vllm_longmamba.calibrate import CalibrationSettings, calibrate
from vllm_longmamba.evaluate.comparison import Progress
from vllm_longmamba.evaluate.engine import EngineContestant
from vllm_longmamba.evaluate.needles import PASSKEY_NEEDLE, PASSKEY_QUESTION, Question, middles, passkey_questions
from vllm_longmamba.evaluate.perplexity import Window, windows
from vllm_longmamba.evaluate.records import Records, settings_key
from vllm_longmamba.evaluate.texts import Book, Encoder
from vllm_longmamba.evaluate.tuning import EXTENSION, Score, Trial, choose, plain, search
from vllm_longmamba.tables import ThresholdTable, load_table, save_table

# What `calibrate` decides itself.
_OF_CALIBRATION = ("max_model_len", "max_num_batched_tokens", "max_num_seqs", "enable_prefix_caching", "enforce_eager")
# Prompts of these multiples of the training length are scored where no lengths are given.
_MULTIPLES = (4, 8)


@dataclass(frozen=True)
class TuningSettings:
    """What is searched, and on what.

    Attributes:
        thetas: the grid of `min_retention`, each between 0 and 1.
        clamp_percents: the grid of C; each takes a calibration.
        refine: finer grids of theta after the first.
        held_out: texts to score on and to hide keys in.
        calibration_texts: files to calibrate on; the package's sample where there are none.
        calibration: settings of every calibration, but for C.
        passkeys: whether keys are asked for.
        perplexity: whether text is scored.
        lengths: tokens of prompts and windows; by default 4 and 8 times the training length.
        depths: places of the key.
        seeds: of the questions.
        windows: at most so many of each length in each text.
        scored_tokens: at the end of each window.
    """

    thetas: Sequence[float]
    clamp_percents: Sequence[float]
    refine: int
    held_out: Sequence[Book]
    calibration_texts: Sequence[Path]
    calibration: CalibrationSettings
    passkeys: bool
    perplexity: bool
    lengths: Sequence[int] | None
    depths: int
    seeds: Sequence[int]
    windows: int
    scored_tokens: int

    def __post_init__(self) -> None:
        for name, values, upper in (("--thetas", self.thetas, 1.0), ("--clamp-percents", self.clamp_percents, 100.0)):
            least_allowed = name == "--clamp-percents"
            wrong = [value for value in values if not (0 < value < upper or (least_allowed and value == 0))]
            if wrong or len(set(values)) < len(values):
                raise ValueError(
                    f"{name} must be different numbers between 0 and {upper:g}, got {', '.join(map(str, values))}"
                )


@dataclass(frozen=True)
class TuningResult:
    """What `tune_model` found.

    Attributes:
        scores: of all settings tried, the plain model's first.
        best: the best of them.
        table: the best setting's table, whose metadata has the best theta as default.
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
    """Search theta and C for a model.

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
    tables = _calibrate_all(model, settings, engine_args, contestant, folder, progress)
    first = next(iter(tables.values()))
    lengths = list(settings.lengths or [factor * load_table(first).metadata.train_length for factor in _MULTIPLES])
    questions, to_score = _tasks(settings, lengths, encoder, books)
    longest = max([max(lengths) + 1, *(one.length + one.max_answer_tokens() for one in questions)])
    loaded = {clamp: load_table(path) for clamp, path in tables.items()}
    filtering = EngineContestant(model, {"table": str(first)}, {"max_model_len": longest, **engine_args})
    records = Records(folder / "records.jsonl")
    try:
        with filtering.start(worker_extension_cls=EXTENSION) as runner:
            trial = Trial(
                runner=runner,
                encoder=encoder,
                tables=tables,
                plain=plain(next(iter(loaded.values()))),
                questions=questions,
                haystack=[token for book in books.values() for token in book],
                windows=to_score,
                books=books,
                scored=settings.scored_tokens,
                settings={**contestant.description, **_task_settings(settings)},
                records=records,
                progress=progress,
            )
            scores = search(trial.score, list(loaded.values()), settings.thetas, settings.refine)
    finally:
        records.close()
    best = choose(scores[1:])
    table = loaded[best.candidate.clamp_percent]
    table = replace(table, metadata=replace(table.metadata, min_retention=best.candidate.min_retention))
    return TuningResult(scores, best, table, contestant, lengths)


def _task_settings(settings: TuningSettings) -> dict[str, Any]:
    return {
        "held_out": {book.name: book.digest for book in settings.held_out},
        "scored_tokens": settings.scored_tokens,
        "wording": [PASSKEY_NEEDLE, PASSKEY_QUESTION],
    }


def _tasks(
    settings: TuningSettings, lengths: Sequence[int], encoder: Encoder, books: Mapping[str, list[int]]
) -> tuple[list[Question], list[Window]]:
    questions: list[Question] = []
    if settings.passkeys:
        questions = list(passkey_questions(lengths, middles(settings.depths), settings.seeds))
        haystack = [token for book in books.values() for token in book]
        for length in (min(lengths), max(lengths)):
            encoder.prompt(next(one for one in questions if one.length == length), haystack)
    to_score: list[Window] = []
    if settings.perplexity:
        sizes = {name: len(encoder.prefix) + len(book) for name, book in books.items()}
        to_score = list(windows(sizes, lengths, settings.windows, settings.scored_tokens))
    return questions, to_score


def _calibrate_all(
    model: str,
    settings: TuningSettings,
    engine_args: Mapping[str, Any],
    contestant: EngineContestant,
    folder: Path,
    progress: Progress,
) -> dict[float, Path]:
    """The table of each C, made where the folder does not have it yet."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {path.name: blake3(path.read_bytes()).hexdigest() for path in settings.calibration_texts}
    allowed = {name: value for name, value in engine_args.items() if name not in _OF_CALIBRATION}
    tables = {}
    for clamp in settings.clamp_percents:
        calibration = replace(settings.calibration, clamp_percent=clamp)
        key = settings_key({**contestant.description, **asdict(calibration), "texts": texts})
        tables[clamp] = folder / f"table-C{clamp:g}-{key}.safetensors"
        if not tables[clamp].exists():
            bar = _bar(progress, f"calibrating, C {clamp:g}")
            table = calibrate(model, list(settings.calibration_texts), calibration, progress=bar, **allowed)
            save_table(table, tables[clamp])
    return tables


def _bar(progress: Progress, description: str) -> Callable[[Iterable[Any]], Iterator[Any]]:
    def wrap(sequences: Iterable[Any]) -> Iterator[Any]:
        todo = list(sequences)
        advance = progress(description, len(todo))
        for sequence in todo:
            yield sequence
            advance()

    return wrap
