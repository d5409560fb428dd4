"""The `longmamba tune` command: searches theta, C, the budget and the unfiltered end on held-out text."""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vllm_longmamba.checkpoint.train_length import DEFAULT_MAX_MODEL_LEN
from vllm_longmamba.commands.engine_options import EngineOptions, with_engine_options
from vllm_longmamba.commands.evaluate import Depths, Model, Output, ScoredTokens, Seeds, Windows, model_settings
from vllm_longmamba.evaluate.terminal import console, numbers, progress_bars, real_numbers, user_errors

if TYPE_CHECKING:
    from vllm_longmamba.evaluate.needles import Question
    from vllm_longmamba.evaluate.perplexity import Window
    from vllm_longmamba.evaluate.texts import Encoder

# Multiples of the training length to score at where no lengths are given. What theta does to text and the clamp to keys
# shows from 16 times on (docs/closed_loop.md).
_MULTIPLES = (8, 16)
# Options of LongMamba that the search sets.
_SEARCHED = ("table", "min_retention", "unfiltered_end")


@with_engine_options(without=("table", "min_retention"))
def tune(
    model: Model,
    held_out: Annotated[
        list[Path],
        typer.Option(
            exists=True,
            help="Text to score on, a file or a folder of *.txt, other text than --text. May be given several times.",
        ),
    ],
    engine: EngineOptions,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Text to calibrate on. May be given several times.",
            show_default="the package's",
        ),
    ] = None,
    output: Output = Path("out/tune"),
    table: Annotated[
        Path | None,
        typer.Option(help="Path of the best table.", show_default="your cache, where vllm serve finds it"),
    ] = None,
    method: Annotated[
        str,
        typer.Option(help="How tables are made, as for longmamba calibrate: paper (C 0 as well) or closed-loop."),
    ] = "paper",
    thetas: Annotated[
        str | None,
        typer.Option(
            help="Values of min_retention to try, separated by commas; in the closed loop each takes a calibration.",
            show_default="1e-40,1e-20,1e-10,1e-5,1e-3,1e-2,0.05,0.2,0.5,0.7; closed loop: the last five from 0.01",
        ),
    ] = None,
    clamp_percents: Annotated[
        str | None,
        typer.Option(
            help="Paper's method: values of clamp_percent to try, separated by commas.", show_default="0,5,10,20"
        ),
    ] = None,
    further: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Paper's method: number of further settings to try after these, proposed by optuna.",
            show_default="2",
        ),
    ] = None,
    budgets: Annotated[
        str | None,
        typer.Option(help="Closed loop, and C 0: budgets to try, separated by commas.", show_default="1"),
    ] = None,
    combine: Annotated[
        str | None, typer.Option(help="Closed loop: how sequences are combined, as for longmamba calibrate.")
    ] = None,
    measure_to: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Closed loop: number of tokens of the longest sequence.",
            show_default="the longest of --lengths",
        ),
    ] = None,
    unfiltered_ends: Annotated[
        str, typer.Option(help="Unfiltered ends to try, in tokens, each with all else, separated by commas.")
    ] = "0",
    score: Annotated[str, typer.Option(help="What decides: passkey, perplexity or both.")] = "both",
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Numbers of tokens in prompts and windows, separated by commas.",
            show_default="8 and 16 times the training length",
        ),
    ] = None,
    depths: Depths = 8,
    seeds: Seeds = "0",
    needles: Annotated[
        int,
        typer.Option(min=0, help="Ask also for one of so many named numbers, as often as for the key."),
    ] = 0,
    search_unfiltered: Annotated[
        bool,
        typer.Option(
            "--search-unfiltered",
            help="Then search global channels (Mamba-1: layers) whose filter costs text, and leave them unfiltered.",
        ),
    ] = False,
    windows: Windows = 10,
    scored_tokens: ScoredTokens = 100,
    sequences: Annotated[int, typer.Option(min=1, help="Number of calibration sequences.")] = 5,
    max_length: Annotated[
        int, typer.Option(min=2, help="Number of tokens of the longest prompt that the table is made for.")
    ] = DEFAULT_MAX_MODEL_LEN,
    calibration_seed: Annotated[int, typer.Option(help="Seed that chooses the calibration sequences.")] = 0,
) -> None:
    """Search the min_retention, clamp_percent, budget and unfiltered end that serve MODEL best; write their table."""
    with user_errors("tune"):
        if importlib.util.find_spec("optuna") is None:
            raise ValueError("optuna not installed; run pip install 'vllm-longmamba[tune]'")

        from vllm_longmamba.calibration.offline import find_train_length
        from vllm_longmamba.calibration.settings import CalibrationSettings
        from vllm_longmamba.checkpoint.table_lookup import cached_table_path
        from vllm_longmamba.checkpoint.trusted_file import make_private_folder
        from vllm_longmamba.evaluate.engine import FILTER_EXTENSION, EngineContestant
        from vllm_longmamba.evaluate.needles import ANSWER_TOKENS
        from vllm_longmamba.evaluate.report import FILES, provenance, write_report
        from vllm_longmamba.evaluate.store import Store, settings_key
        from vllm_longmamba.evaluate.texts import read_books
        from vllm_longmamba.evaluate.tuning import Scorer, choose, plain, search
        from vllm_longmamba.evaluate.tuning import search_unfiltered as left_out
        from vllm_longmamba.evaluate.tuning_report import summarize_tuning, tuning_markdown
        from vllm_longmamba.evaluate.tuning_tables import Grid, calibration_arguments, make_tables
        from vllm_longmamba.options import KEY
        from vllm_longmamba.tables import CLOSED_LOOP, leave_unfiltered, save_table

        _check_scores(score, needles, search_unfiltered, method, measure_to)
        grid = Grid(
            method,
            thetas=real_numbers(thetas) if thetas is not None else None,
            clamp_percents=real_numbers(clamp_percents) if clamp_percents is not None else None,
            budgets=real_numbers(budgets) if budgets is not None else None,
            further=further,
            unfiltered_ends=numbers(unfiltered_ends),
        )
        settings = model_settings(model, engine, worker_extension_cls=FILTER_EXTENSION)
        given = settings.longmamba["additional_config"][KEY]
        if named := [name for name in _SEARCHED if name in given]:
            raise ValueError(f"--engine-args: additional_config names {named[0]}, which this command searches")
        calibration = CalibrationSettings(
            num_sequences=sequences,
            train_length=engine.train_length,
            max_length=max_length,
            seed=calibration_seed,
            method=method,
            combine=combine,
            measure_to=measure_to,
        )
        _check_replaceable(table)
        contestant = EngineContestant(settings.plain, filters=False, starting=settings.starting)
        encoder, held = contestant.encoder, read_books(held_out)
        books = {book.name: encoder.encode(book.text) for book in held}
        trained = find_train_length(model, calibration, calibration_arguments(settings))
        wanted = numbers(lengths) if lengths else [factor * trained for factor in _MULTIPLES]
        # Before the calibrations: too little text is said at once.
        asked = _questions(wanted, depths, numbers(seeds), needles, encoder, books) if score != "perplexity" else []
        scored = _windows(wanted, windows, scored_tokens, encoder, books) if score != "passkey" else []
        if method == CLOSED_LOOP and measure_to is None:
            calibration = replace(calibration, measure_to=max(wanted))
        what = {
            "held_out": {book.name: book.digest for book in held},
            "scored_tokens": scored_tokens,
            "needles": needles,
        }
        with Store(output) as store, progress_bars() as progress:
            store.check_files(FILES)
            tables = make_tables(settings, grid, calibration, text or [], contestant.description, output, progress)
            longest = max(wanted) + ANSWER_TOKENS
            arguments = settings.with_room(longest).longmamba
            options = {KEY: {**given, "table": str(tables[0].path)}}
            arguments = {**arguments, "additional_config": {**arguments["additional_config"], **options}}
            with EngineContestant(arguments, starting=settings.starting).start() as runner:
                scorer = Scorer(
                    runner=runner,
                    encoder=encoder,
                    folder=output,
                    plain=plain(tables),
                    questions=asked,
                    haystack=[token for book in books.values() for token in book],
                    windows=scored,
                    books=books,
                    scored=scored_tokens,
                    settings={**contestant.description, **what},
                    store=store,
                    progress=progress,
                )
                key = settings_key(
                    {**scorer.settings, "score": score, "lengths": wanted, "depths": depths, "seeds": seeds}
                )
                scores = search(scorer.score, tables, grid, output, key)
                if search_unfiltered:
                    first = choose(scores[1:])
                    tried = next(one for one in tables if one.path.name == first.candidate.table)
                    scores += left_out(scorer.score, replace(scorer, questions=[]).score, tried, first)
            best = choose(scores[1:])
            setting = best.candidate
            chosen = next(one.table for one in tables if one.path.name == setting.table)
            chosen = leave_unfiltered(chosen, setting.unfiltered)
            metadata = replace(
                chosen.metadata, min_retention=setting.min_retention, unfiltered_end=setting.unfiltered_end
            )
            quantization = contestant.description["quantization"]
            path = table or cached_table_path(metadata.weights_fingerprint, quantization)
            if table is None:
                make_private_folder(path.parent)
            path.parent.mkdir(parents=True, exist_ok=True)
            save_table(replace(chosen, metadata=metadata), path)
            what |= {"method": method, "lengths": wanted, "depths": depths, "seeds": seeds, "windows": windows}
            what |= {"corpus": metadata.corpus, "sequences": sequences}
            if metadata.closed_loop is not None:
                what |= {"combine": metadata.closed_loop.combine, "measured": list(metadata.closed_loop.lengths)}
            report = {
                "task": "tune",
                **provenance(model, {"plain": contestant}, what),
                **summarize_tuning(scores, best),
            }
            title = f"Tuning: {Path(model).name}"
            write_report(store, report, lambda _: tuning_markdown(report, title))
        console.print(f"table with the best setting ({setting.label()}) as its default: {path}", soft_wrap=True)


def _check_scores(score: str, needles: int, search_unfiltered: bool, method: str, measure_to: int | None) -> None:
    from vllm_longmamba.tables import CLOSED_LOOP

    if score not in ("passkey", "perplexity", "both"):
        raise ValueError(f"--score must be passkey, perplexity or both, got {score!r}")
    if needles and score == "perplexity":
        raise ValueError("--needles asks for more than the pass key; leave out --score perplexity, or --needles")
    if search_unfiltered and score == "passkey":
        raise ValueError("--search-unfiltered goes by the loss of text; leave out --score passkey")
    if method != CLOSED_LOOP and measure_to is not None:
        raise ValueError(
            f"--measure-to has a part in the method {CLOSED_LOOP} only; leave it out, or give --method {CLOSED_LOOP}"
        )


def _check_replaceable(table: Path | None) -> None:
    """Refuse to write the best table over what is no table."""
    from vllm_longmamba.tables import read_metadata

    if table is None or not table.exists():
        return
    try:
        read_metadata(table)
    except ValueError as error:
        raise ValueError(f"--table {table}: is there, and no threshold table ({error}); give another path") from error


def _questions(
    lengths: Sequence[int],
    depths: int,
    seeds: Sequence[int],
    needles: int,
    encoder: "Encoder",
    books: Mapping[str, list[int]],
) -> list["Question"]:
    from vllm_longmamba.evaluate.needles import middles, needle_questions, passkey_questions

    places = middles(depths)
    questions = list(passkey_questions(lengths, places, seeds))
    if needles:
        questions += needle_questions(lengths, places, seeds, needles)
    haystack = [token for book in books.values() for token in book]
    for length in (min(lengths), max(lengths)):
        encoder.prompt(next(one for one in questions if one.length == length), haystack)
    return questions


def _windows(
    lengths: Sequence[int], number: int, scored: int, encoder: "Encoder", books: Mapping[str, list[int]]
) -> list["Window"]:
    from vllm_longmamba.evaluate.perplexity import windows

    sizes = {name: len(encoder.prefix) + len(book) for name, book in books.items()}
    return list(windows(sizes, lengths, number, scored))
