"""The `longmamba tune` command: searches theta, C, the budget and the unfiltered end on held-out text."""

from pathlib import Path
from typing import Annotated

import typer

from vllm_longmamba.checkpoint.train_length import DEFAULT_MAX_MODEL_LEN
from vllm_longmamba.commands.evaluate import (
    Depths,
    Dtype,
    EngineArg,
    MaxModelLen,
    Model,
    Output,
    Seeds,
    TensorParallel,
    Tokenizer,
)
from vllm_longmamba.evaluate.command_line import (
    console,
    drawn,
    engine_arguments,
    numbers,
    progress_bars,
    real_numbers,
    user_errors,
    write_report,
)


def tune(
    model: Model,
    held_out: Annotated[
        list[Path],
        typer.Option(exists=True, help="Text to score on, a file or a folder of *.txt; repeatable. Not the --text."),
    ],
    text: Annotated[
        list[Path] | None,
        typer.Option(exists=True, dir_okay=False, help="Text to calibrate on; repeatable. [default: the package's]"),
    ] = None,
    output: Output = Path("out/tune"),
    table: Annotated[
        Path | None, typer.Option(help="Where the best table goes. [default: your cache, where vllm serve finds it]")
    ] = None,
    method: Annotated[
        str,
        typer.Option(help="How tables are made, as for longmamba calibrate: paper (C 0 as well) or closed-loop."),
    ] = "paper",
    thetas: Annotated[
        str | None,
        typer.Option(
            help="min_retention to try, separated by commas; in the closed loop each takes a calibration. "
            "[default: 1e-40,1e-20,1e-10,1e-5,1e-3,1e-2,0.05,0.2,0.5,0.7; closed loop: the last five from 0.01]"
        ),
    ] = None,
    clamp_percents: Annotated[
        str | None,
        typer.Option(help="Paper's method: clamp_percent to try, separated by commas. [default: 0,5,10,20]"),
    ] = None,
    refine: Annotated[
        int | None,
        typer.Option(min=0, help="Paper's method: finer grids of theta around the best, after the first. [default: 1]"),
    ] = None,
    budgets: Annotated[
        str | None,
        typer.Option(help="Closed loop, and C 0: as for longmamba calibrate, separated by commas. [default: 1]"),
    ] = None,
    combine: Annotated[
        str | None, typer.Option(help="Closed loop: as for longmamba calibrate. [default: median]")
    ] = None,
    measure_to: Annotated[
        int | None,
        typer.Option(min=2, help="Closed loop: as for longmamba calibrate. [default: the longest of --lengths]"),
    ] = None,
    unfiltered_ends: Annotated[
        str | None,
        typer.Option(help="Tokens, as for longmamba calibrate, each with all else, separated by commas. [default: 0]"),
    ] = None,
    score: Annotated[str, typer.Option(help="What decides: passkey, perplexity or both.")] = "both",
    lengths: Annotated[
        str | None,
        typer.Option(help="Tokens of prompts and windows. [default: 8 and 16 times the training length]"),
    ] = None,
    depths: Depths = 8,
    seeds: Seeds = "0",
    needles: Annotated[
        int,
        typer.Option(min=0, help="Ask also for one of so many named numbers, as often as for the key. [default: none]"),
    ] = 0,
    search_unfiltered: Annotated[
        bool,
        typer.Option(
            "--search-unfiltered",
            help="Then search global channels (Mamba-1: layers) whose filter costs text, and leave them unfiltered.",
        ),
    ] = False,
    windows: Annotated[int, typer.Option(min=1, help="At most so many windows of each length in each text.")] = 10,
    scored_tokens: Annotated[int, typer.Option(min=1, help="Tokens scored at the end of each window.")] = 100,
    sequences: Annotated[int, typer.Option(min=1, help="Number of calibration sequences.")] = 5,
    train_length: Annotated[int | None, typer.Option(min=2, help="As for longmamba calibrate.")] = None,
    max_length: Annotated[int, typer.Option(min=2, help="As for longmamba calibrate.")] = DEFAULT_MAX_MODEL_LEN,
    calibration_seed: Annotated[int, typer.Option(help="Chooses the calibration sequences.")] = 0,
    dtype: Dtype = "auto",
    tokenizer: Tokenizer = None,
    tensor_parallel_size: TensorParallel = 1,
    max_model_len: MaxModelLen = None,
    engine_arg: EngineArg = None,
) -> None:
    """Search the min_retention, clamp_percent, budget and unfiltered end that serve MODEL best; write their table."""
    with user_errors("tune"):
        from vllm_longmamba.calibration.settings import CalibrationSettings
        from vllm_longmamba.checkpoint.table_lookup import cached_table_path
        from vllm_longmamba.evaluate.report import provenance
        from vllm_longmamba.evaluate.texts import read_books
        from vllm_longmamba.evaluate.tuning_report import draw_tuning, summarize_tuning, tuning_markdown
        from vllm_longmamba.evaluate.tuning_run import tune_model
        from vllm_longmamba.evaluate.tuning_settings import TuningSettings, make_grid
        from vllm_longmamba.tables import save_table

        if score not in ("passkey", "perplexity", "both"):
            raise ValueError(f"--score must be passkey, perplexity or both, got {score!r}")
        calibration = CalibrationSettings(
            num_sequences=sequences,
            train_length=train_length,
            max_length=max_length,
            seed=calibration_seed,
            method=method,
            combine=combine,
            measure_to=measure_to,
        )
        settings = TuningSettings(
            grid=make_grid(
                method,
                thetas=real_numbers(thetas) if thetas is not None else None,
                clamp_percents=real_numbers(clamp_percents) if clamp_percents is not None else None,
                budgets=real_numbers(budgets) if budgets is not None else None,
                refine=refine,
                unfiltered_ends=numbers(unfiltered_ends) if unfiltered_ends is not None else None,
            ),
            held_out=read_books(held_out),
            calibration_texts=text or [],
            calibration=calibration,
            passkeys=score != "perplexity",
            perplexity=score != "passkey",
            lengths=numbers(lengths) if lengths else None,
            depths=depths,
            seeds=numbers(seeds),
            windows=windows,
            scored_tokens=scored_tokens,
            needles=needles,
            search_unfiltered=search_unfiltered,
        )
        engine_args = engine_arguments(dtype, tokenizer, tensor_parallel_size, max_model_len, engine_arg)
        with progress_bars() as progress:
            result = tune_model(model, settings, engine_args, output, progress)
        metadata = result.table.metadata
        quantization = result.contestant.description["quantization"]
        path = table or cached_table_path(metadata.weights_fingerprint, quantization)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_table(result.table, path)
        what = {
            "method": metadata.method,
            "lengths": result.lengths,
            "depths": depths,
            "seeds": seeds,
            "windows": windows,
            "scored_tokens": scored_tokens,
            "held_out": {book.name: book.digest for book in settings.held_out},
            "corpus": metadata.corpus,
            "sequences": sequences,
        }
        if needles:
            what["needles"] = needles
        if metadata.closed_loop is not None:
            what |= {"combine": metadata.closed_loop.combine, "measured": list(metadata.closed_loop.lengths)}
        report = {
            "task": "tune",
            **provenance(model, {"model": result.contestant}, what),
            **summarize_tuning(result.scores, result.best),
        }
        write_report(output, report, tuning_markdown(report, drawn(lambda: draw_tuning(report, output))))
        without = f", without {', '.join(metadata.unfiltered)}," if metadata.unfiltered else ""
        default = f"table with min_retention {metadata.min_retention:.3g} as its default{without}"
        console.print(f"{default}: {path}", markup=False)
