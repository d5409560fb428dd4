"""The `longmamba tune` command: searches the budget, theta and the unfiltered end on a user's text."""

import importlib.util
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_longmamba.checkpoint.train_length import DEFAULT_MAX_MODEL_LEN
from vllm_longmamba.commands.calibrate import check_replaceable
from vllm_longmamba.commands.engine_errors import explained_start
from vllm_longmamba.commands.engine_options import EngineOptions, with_options
from vllm_longmamba.commands.evaluate import Depths, Model, Output, Windows, check_room, method_arguments
from vllm_longmamba.evaluate.terminal import console, progress_bars, read_lengths, read_numbers

# Multiples of the training length to score at where no lengths are given: what the settings do shows there.
_MULTIPLES = (8, 16)
# Options of LongMamba that the search sets.
_SEARCHED = ("table", "min_retention", "unfiltered_end")


@with_options(without=("table", "min_retention"), engine=EngineOptions)
def tune(
    model: Model,
    text: Annotated[
        list[Path],
        typer.Option(
            exists=True, help="Text like that to be served, a file or a folder of *.txt. May be given several times."
        ),
    ],
    engine: EngineOptions,
    calibration_text: Annotated[
        list[Path] | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Other text, to calibrate on. May be given several times.",
            show_default="the package's",
        ),
    ] = None,
    output: Output = Path("out/tune"),
    table: Annotated[
        Path | None,
        typer.Option(
            help="Path of the best table.", show_default="beside the model; your cache if it lies in no folder of yours"
        ),
    ] = None,
    budgets: Annotated[
        str, typer.Option(help="Budgets to try beside the default's (0.5), separated by commas.")
    ] = "0.25,1,2",
    thetas: Annotated[str, typer.Option(help="Smallest and largest min_retention to try.")] = "0.001,0.5",
    unfiltered_ends: Annotated[
        str,
        typer.Option(
            help="Unfiltered ends to try beside the default's (half of the training length), in tokens, separated by "
            "commas."
        ),
    ] = "0",
    trials: Annotated[int, typer.Option(min=1, help="Number of settings to try.")] = 16,
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Numbers of tokens in prompts and windows, separated by commas.",
            show_default="8 and 16 times the training length",
        ),
    ] = None,
    depths: Depths = 8,
    windows: Windows = 10,
    max_length: Annotated[
        int, typer.Option(min=2, help="Number of tokens of the longest prompt that the table is made for.")
    ] = DEFAULT_MAX_MODEL_LEN,
) -> None:
    """Search the budget, min_retention and unfiltered end that serve MODEL best on your text; write their table."""
    if importlib.util.find_spec("optuna") is None:
        raise ValueError("optuna not installed; run pip install 'vllm-longmamba[tune]'")

    from vllm_longmamba.calibration.offline import find_train_length
    from vllm_longmamba.calibration.settings import CalibrationSettings, to_config
    from vllm_longmamba.checkpoint.table_lookup import FILE_NAME
    from vllm_longmamba.evaluate.engine import FILTER_EXTENSION, EngineContestant
    from vllm_longmamba.evaluate.needles import ANSWER_TOKENS
    from vllm_longmamba.evaluate.report import FILES, provenance, write_report
    from vllm_longmamba.evaluate.store import Store
    from vllm_longmamba.evaluate.texts import read_books
    from vllm_longmamba.evaluate.tuning import (
        Scorer,
        Space,
        calibrations,
        choose,
        default_setting,
        halves,
        search,
    )
    from vllm_longmamba.evaluate.tuning_report import draw_tuning, summarize_tuning, tuning_markdown
    from vllm_longmamba.options import KEY
    from vllm_longmamba.tables import load_table, save_table

    space = Space(
        read_numbers("--budgets", budgets, float),
        read_numbers("--thetas", thetas, float),
        read_numbers("--unfiltered-ends", unfiltered_ends, int),
        trials,
    )
    plain = method_arguments("plain", model, engine)
    arguments = method_arguments("longmamba", model, engine, worker_extension_cls=FILTER_EXTENSION)
    given = arguments["additional_config"][KEY]
    if named := [name for name in _SEARCHED if name in given]:
        raise ValueError(f"--engine-args: additional_config names {named[0]}, which this command searches")
    if given.get("filter_generated"):
        raise ValueError("--engine-args: additional_config names filter_generated, which allows no unfiltered end")
    calibration = CalibrationSettings(
        train_length=engine.train_length, max_length=max_length, texts=tuple(map(str, calibration_text or ()))
    )
    check_replaceable(table or Path(model) / FILE_NAME, "--table")
    starting = partial(explained_start, engine.verbose)
    with starting():
        trained = find_train_length(model, calibration, dict(plain))
    multiples = [factor * trained for factor in _MULTIPLES]
    wanted = multiples if lengths is None else read_lengths("--lengths", lengths)
    calibration = replace(calibration, train_length=trained)
    default = default_setting(calibration)
    space = space.including(default)
    if not calibration.can_filter(max(wanted)):
        raise ValueError(f"--lengths: prompts of {max(wanted)} tokens are not filtered; give longer ones")
    check_room(engine, max(wanted) + ANSWER_TOKENS)
    contestant = EngineContestant(plain, "plain", starting)
    encoder, texts = contestant.encoder, read_books(text)
    books = {book.name: encoder.encode(book.text) for book in texts}
    # Before the calibrations: too little text is said at once.
    first, second = halves(books, encoder, wanted, depths, windows)
    what: dict[str, Any] = {"texts": {book.name: book.digest for book in texts}}
    with Store(output) as store, progress_bars() as progress:
        store.check_files(FILES)
        made = calibrations(space.budgets, calibration, contestant.description, output / "tables")
        tables = {each.budget_before_end(): Path(str(each.store)) for each in made}
        arguments["additional_config"] |= to_config(made)
        filtering = EngineContestant({"max_model_len": max(wanted) + ANSWER_TOKENS, **arguments}, starting=starting)
        with filtering.start() as runner:
            scorer = Scorer(runner, encoder, tables, {**contestant.description, **what}, store, progress)
            scores = search(partial(scorer.score, part=first), space, default)
            best = choose(scores[1:])
            shown = dict.fromkeys([default.plain(), default, best.setting])
            held_out = [scorer.score(setting, second) for setting in shown]
        setting, chosen = best.setting, load_table(tables[best.setting.budget])
        metadata = replace(chosen.metadata, min_retention=setting.min_retention, unfiltered_end=setting.unfiltered_end)
        path = table or _table_path(model, metadata.weights_fingerprint, contestant.description["quantization"])
        path.parent.mkdir(parents=True, exist_ok=True)
        save_table(replace(chosen, metadata=metadata), path)
        what |= {"corpus": metadata.corpus, "lengths": wanted, "depths": depths, "windows": windows}
        head = provenance("tune", model, {"plain": contestant}, what)
        report = head | summarize_tuning(scores, best, held_out)
        write_report(store, report, "Tuning", tuning_markdown, draw_tuning)
    console.print(f"table with the best setting ({setting.label()}) as its default: {path}", soft_wrap=True)


def _table_path(model: str, fingerprint: str, quantization: str | None) -> Path:
    """Where `vllm serve` finds the table: beside the weights, otherwise in the user's cache."""
    from vllm_longmamba.checkpoint.table_lookup import FILE_NAME, cached_table_path
    from vllm_longmamba.checkpoint.trusted_file import make_private_folder

    if Path(model).is_dir() and os.access(model, os.W_OK) and quantization is None:
        return Path(model) / FILE_NAME
    path = cached_table_path(fingerprint, quantization)
    make_private_folder(path.parent)
    return path
