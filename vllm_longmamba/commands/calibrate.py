"""The `longmamba calibrate` command."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track

from vllm_longmamba.model_length import DEFAULT_MAX_MODEL_LEN

console = Console(stderr=True)


def calibrate(
    model: Annotated[str, typer.Argument(help="Name or folder of the model, as for vllm serve.")],
    text: Annotated[list[Path], typer.Option(exists=True, dir_okay=False, help="Text to calibrate on; repeatable.")],
    output: Annotated[
        Path | None,
        typer.Option(help="Table to write. By default it goes to your cache, where the next vllm serve finds it."),
    ] = None,
    sequences: Annotated[int, typer.Option(min=1, help="Number of calibration sequences.")] = 5,
    clamp_percent: Annotated[
        float | None,
        typer.Option(min=0, max=99.9, help="Per cent of the largest dt's to clamp. [default: 20; Mamba-2: 5]"),
    ] = None,
    min_retention: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Retention above which a channel is global; serving may change it.")
    ] = 1e-2,
    train_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens the model was trained on. [default: what is known of the model]")
    ] = None,
    max_length: Annotated[
        int, typer.Option(min=2, help="Longest prompt, in tokens, to make thresholds for.")
    ] = DEFAULT_MAX_MODEL_LEN,
    seed: Annotated[int, typer.Option(help="Chooses the sequences.")] = 0,
    dtype: Annotated[str, typer.Option(help="Data type of the model, as for vllm serve.")] = "auto",
    tokenizer: Annotated[str | None, typer.Option(help="Tokenizer, as for vllm serve.")] = None,
    tensor_parallel_size: Annotated[int, typer.Option("--tensor-parallel-size", "--tp", min=1)] = 1,
) -> None:
    """Make the threshold table of MODEL from text like that of its training."""
    from vllm_longmamba.calibrate import CalibrationSettings, calibrate
    from vllm_longmamba.table_lookup import cached_table_path
    from vllm_longmamba.tables import save_table

    settings = CalibrationSettings(sequences, clamp_percent, min_retention, train_length, max_length, seed)
    engine_args: dict[str, Any] = {"dtype": dtype, "tensor_parallel_size": tensor_parallel_size}
    if tokenizer is not None:
        engine_args["tokenizer"] = tokenizer
    try:
        table = calibrate(model, text, settings, progress=_progress_bar, **engine_args)
        path = output or cached_table_path(table.metadata.weights_fingerprint)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_table(table, path)
    except (ValueError, OSError) as error:
        console.print(f"[bold red]longmamba calibrate:[/] {error}")
        raise typer.Exit(1) from None
    channels = sum(len(layer.retention) for layer in table.layers.values())
    global_channels = sum(int(table.is_global(layer).sum()) for layer in table.layers)
    console.print(
        f"wrote {path}: {len(table.layers)} layers, {global_channels} of {channels} channels global, "
        f"rows up to {int(table.row_lengths[-1])} tokens"
    )


def _progress_bar(sequences: Iterable[Any]) -> Iterable[Any]:
    return track(sequences, description="calibrating", console=console)
