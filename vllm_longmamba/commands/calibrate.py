"""The `longmamba calibrate` command."""

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vllm_longmamba.checkpoint.train_length import DEFAULT_MAX_MODEL_LEN
from vllm_longmamba.commands.engine_options import EngineOptions, engine_arguments, with_options

console = Console(stderr=True)


@with_options(without=("table", "min_retention", "max_model_len"), engine=EngineOptions)
def calibrate(
    model: Annotated[str, typer.Argument(help="Name or folder of the model, as for vllm serve.")],
    text: Annotated[
        list[Path] | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Text to calibrate on: plain text (UTF-8), .jsonl or .parquet; repeatable. "
            "(default: the sample that comes with the package)",
        ),
    ] = None,
    text_column: Annotated[str, typer.Option(help="Field or column of .jsonl and .parquet files.")] = "text",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Table to write. By default it goes to your cache, where the next vllm serve finds it.",
        ),
    ] = None,
    sequences: Annotated[int, typer.Option(min=1, help="Number of calibration sequences.")] = 5,
    clamp_percent: Annotated[
        float | None,
        typer.Option(
            min=0, max=99.9, help="Paper's method: per cent of the largest dt's to clamp. (default: 20; Mamba-2: 5)"
        ),
    ] = None,
    min_retention: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Retention above which a channel is global; serving may change it. (default: 0.05; paper: 0.01)",
        ),
    ] = None,
    max_length: Annotated[
        int, typer.Option(min=2, help="Longest prompt, in tokens, to make thresholds for.")
    ] = DEFAULT_MAX_MODEL_LEN,
    seed: Annotated[int, typer.Option(help="Chooses the sequences.")] = 0,
    method: Annotated[
        str | None,
        typer.Option(
            help="paper: stretch what sequences of the training length show. unclamped: the same without the clamp, "
            "with a mean over the sequences in which outliers are clipped, and with an unfiltered end. "
            "(default: unclamped; with --clamp-percent: paper)"
        ),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            help="What a channel may keep before the unfiltered end, as a factor of its sum over the training length.",
            show_default="what the unfiltered end leaves of 1, at least 0.25; paper: 1",
        ),
    ] = None,
    unfiltered_end: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="As many of a prompt's last tokens are not filtered; serving may change it.",
            show_default="half of the training length; paper: 0",
        ),
    ] = None,
    quantization: Annotated[str | None, typer.Option(help="Quantization of the model, as for vllm serve.")] = None,
    *,
    engine: EngineOptions,
) -> None:
    """Make the threshold table of MODEL from text like that of its training."""
    from vllm_longmamba.calibration.offline import calibrate as make_table
    from vllm_longmamba.calibration.settings import CalibrationSettings
    from vllm_longmamba.checkpoint.table_lookup import cached_table_path
    from vllm_longmamba.checkpoint.trusted_file import make_private_folder
    from vllm_longmamba.commands.engine_errors import explained_start
    from vllm_longmamba.tables import save_table

    settings = CalibrationSettings(
        num_sequences=sequences,
        clamp_percent=clamp_percent,
        min_retention=min_retention,
        train_length=engine.train_length,
        max_length=max_length,
        seed=seed,
        method=method,
        budget=budget,
        unfiltered_end=unfiltered_end,
        texts=tuple(str(path) for path in text or ()),
        text_column=text_column,
    )
    arguments = engine_arguments(model, engine, quantization=quantization)
    if output is not None:
        # Before the model is loaded.
        check_replaceable(output, "--output")
        output.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(output.parent, os.W_OK):
            raise ValueError(f"{output}: the folder must not be written to; give another path, --output")
    with explained_start(engine.verbose):
        table = make_table(arguments.pop("model"), settings, **arguments)
    path = output or cached_table_path(table.metadata.weights_fingerprint, quantization)
    if output is None:
        make_private_folder(path.parent)
    save_table(table, path)
    channels = sum(len(layer.retention) for layer in table.layers.values())
    share = f"{table.count_global()} of {channels} channels global"
    rows = f"rows up to {int(table.row_lengths[-1])} tokens"
    console.print(f"wrote {path}: {len(table.layers)} layers, {share}, {rows}", markup=False, soft_wrap=True)


def check_replaceable(table: Path, option: str) -> None:
    """Refuse to write a table over what is no table, of whatever format version.

    Args:
        table: path to write to.
        option: names another one.

    Raises:
        ValueError: something else is there.
    """
    from vllm_longmamba.tables import is_table_file

    if table.exists() and not is_table_file(table):
        raise ValueError(f"{table}: is there, and no threshold table; remove it, or give another path, {option}")
