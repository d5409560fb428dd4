"""The `longmamba inspect` command."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track

from vllm_longmamba.commands.engine_options import EngineOptions, engine_arguments, with_engine_options
from vllm_longmamba.evaluate.terminal import read_numbers

messages = Console(stderr=True)


@with_engine_options(without=("max_model_len", "tensor_parallel_size"))
def inspect(
    model_or_table: Annotated[
        str, typer.Argument(help="A table (.safetensors file), or a model: a name or folder, as for vllm serve.")
    ],
    text: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="With a model: plain text to run through it and measure."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for pictures, PNG and SVG (needs matplotlib)."),
    ] = None,
    lengths: Annotated[
        str | None, typer.Option(help="Prompt lengths in tokens, such as 4096,8192. (default: training lengths x 2^n)")
    ] = None,
    channel: Annotated[
        list[str] | None,
        typer.Option(help="LAYER:CHANNEL whose receptive field is drawn; repeatable. (default: three)"),
    ] = None,
    *,
    engine: EngineOptions,
) -> None:
    """Show what is in a threshold table and, with a text, what it does to the model."""
    from vllm_longmamba.commands.engine_errors import explained_start
    from vllm_longmamba.inspect.measure import SET_HERE
    from vllm_longmamba.inspect.report import report

    set_here: dict[str, Any] = dict.fromkeys(SET_HERE)
    measuring = engine_arguments(model_or_table, engine, **set_here) if text is not None else {}
    measuring.pop("model", None)
    files = report(
        model_or_table,
        Console(),
        text=text,
        output=output,
        lengths=read_numbers("--lengths", lengths, int) if lengths else None,
        channels=channel or [],
        table_path=engine.table,
        min_retention=engine.min_retention,
        progress=_progress_bar,
        starting=partial(explained_start, engine.verbose),
        **measuring,
    )
    for file in files:
        messages.print(f"wrote {file}", markup=False, soft_wrap=True)


def _progress_bar(passes: list[Any]) -> Iterable[Any]:
    return track(passes, description="measuring", console=messages)
