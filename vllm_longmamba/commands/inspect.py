"""The `longmamba inspect` command."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track

from vllm_longmamba.commands.engine_options import EngineOptions, engine_arguments, with_options
from vllm_longmamba.evaluate.terminal import read_lengths

messages = Console(stderr=True)


@with_options(without=("max_model_len", "tensor_parallel_size"), engine=EngineOptions)
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
        typer.Option("--output", "-o", file_okay=False, help="Folder for pictures, PNG and SVG (needs matplotlib)."),
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
    from vllm_longmamba.evaluate.pictures import as_files
    from vllm_longmamba.inspect import pictures
    from vllm_longmamba.inspect.measure import SET_HERE, choose_channels, measure, parse_channel
    from vllm_longmamba.inspect.summary import default_lengths, layer_table, measured_table, provenance
    from vllm_longmamba.tables import load_table

    wanted = None if lengths is None else read_lengths("--lengths", lengths)
    path = _table_path(model_or_table, text, engine)
    table = load_table(path)
    own_theta = table.metadata.min_retention
    if engine.min_retention is not None:
        table = replace(table, metadata=replace(table.metadata, min_retention=engine.min_retention))
    chosen = [parse_channel(name, table) for name in channel or ()] or choose_channels(table)
    set_here: dict[str, Any] = dict.fromkeys(SET_HERE)
    arguments = engine_arguments(model_or_table, engine, **set_here) if text is not None else {}

    console, figures = Console(), {}
    if output is not None:
        figures = {"retention": pictures.retention_picture(table), "thresholds": pictures.threshold_picture(table)}
    console.print(provenance(table, str(path), own_theta))
    console.print(layer_table(table, wanted or default_lengths(table)))
    if text is not None:
        progress = partial(track, description="measuring", console=messages)
        starting = partial(explained_start, engine.verbose)
        measured = measure(
            arguments.pop("model"), table, path, text, wanted, chosen, progress=progress, starting=starting, **arguments
        )
        console.print(measured_table(table, measured))
        if output is not None:
            figures["kept"] = pictures.kept_picture(table, measured)
            figures["receptive_fields"] = pictures.receptive_field_picture(table, measured)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        files = {name: content for stem, figure in figures.items() for name, content in as_files(figure, stem).items()}
        for name, content in files.items():
            (output / name).write_bytes(content)
            messages.print(f"wrote {output / name}", markup=False, soft_wrap=True)


def _table_path(model_or_table: str, text: Path | None, engine: EngineOptions) -> Path:
    """The table that is named, or the model's, whose weights vLLM finds (and for a model on the hub, downloads)."""
    path, table = Path(model_or_table), engine.table
    if path.is_file() or path.suffix == ".safetensors":
        if text is not None or table is not None:
            raise ValueError(
                f"{path}: a table by itself has no Δt of a text, and --table needs a model; name the model "
                f"(`longmamba inspect MODEL --table {path} --text FILE`)"
            )
        return path
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins

    from vllm_longmamba.architectures import MODEL_IMPL
    from vllm_longmamba.checkpoint.table_lookup import find_table, locate_weights
    from vllm_longmamba.commands.engine_errors import explained_start
    from vllm_longmamba.options import LongMambaOptions

    # Ours makes original checkpoints readable.
    load_general_plugins()
    arguments = EngineArgs(model=model_or_table, model_impl=MODEL_IMPL)
    with explained_start(engine.verbose):
        weights = locate_weights(arguments.create_model_config(), arguments.create_load_config())
    return find_table(model_or_table, weights, LongMambaOptions(table=None if table is None else str(table)))
