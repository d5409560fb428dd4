"""The `longmamba inspect` command."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track

messages = Console(stderr=True)


def inspect(
    model_or_table: Annotated[
        str, typer.Argument(help="A table (.safetensors file), or a model: a name or folder, as for vllm serve.")
    ],
    text: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="With a model: plain text to run through it and measure."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for pictures, PNG and SVG (needs matplotlib).")] = None,
    lengths: Annotated[
        str | None, typer.Option(help="Prompt lengths in tokens, such as 4096,8192. [default: training lengths x 2^n]")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Layers to show, such as 0,4-7. [default: all; curves: four]")
    ] = None,
    channel: Annotated[
        list[str] | None,
        typer.Option(help="LAYER:CHANNEL whose receptive field is drawn; repeatable. [default: three]"),
    ] = None,
    table: Annotated[
        Path | None, typer.Option(help="With a model: the table to use, instead of the one found.")
    ] = None,
    min_retention: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Retention above which a channel is global.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="With --text: data type of the model, as for vllm serve.")] = "auto",
    tokenizer: Annotated[str | None, typer.Option(help="With --text: tokenizer, as for vllm serve.")] = None,
) -> None:
    """Show what is in a threshold table and, with a text, what it does to the model."""
    from vllm_longmamba.inspect.report import Request, report

    request = Request(
        model_or_table=model_or_table,
        text=text,
        output=output,
        lengths=lengths,
        layers=layers,
        channels=channel or [],
        table=table,
        min_retention=min_retention,
        engine_args={"dtype": dtype} | ({} if tokenizer is None else {"tokenizer": tokenizer}),
    )
    try:
        for file in report(request, Console(), _progress_bar):
            messages.print(f"wrote {file}", markup=False, soft_wrap=True)
    except (ValueError, OSError) as error:
        messages.print("[bold red]longmamba inspect:[/]", end=" ")
        messages.print(str(error), markup=False)
        raise typer.Exit(1) from None


def _progress_bar(passes: list[Any]) -> Iterable[Any]:
    return track(passes, description="measuring", console=messages)
