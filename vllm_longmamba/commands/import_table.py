"""The `longmamba import-table` command."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

console = Console(stderr=True)


def import_table(
    folder: Annotated[
        Path, typer.Argument(exists=True, file_okay=False, help="Folder that holds tA_prod/ and delta_t-thre/.")
    ],
    model: Annotated[str, typer.Option(help="Name or folder of the model they were made for, as for vllm serve.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Table to write. By default it goes to your cache, where the next vllm serve finds it.",
        ),
    ] = None,
    train_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens the model was trained on. (default: what is known of the model)")
    ] = None,
    min_retention: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, help="Retention above which a channel is global (-c of the authors' scripts)."),
    ] = 1e-2,
    clamp_percent: Annotated[
        float | None,
        typer.Option(min=0, max=99.9, help="Clamp the files were made with, for the record. (default: 20; Mamba-2: 5)"),
    ] = None,
    sequences: Annotated[int, typer.Option(min=1, help="Sequences they were made from, for the record.")] = 5,
) -> None:
    """Turn the calibration files that LongMamba's authors released into a threshold table."""
    from vllm_longmamba.calibration.released_files import ReleaseSettings, import_table
    from vllm_longmamba.checkpoint.shapes import open_model
    from vllm_longmamba.checkpoint.table_lookup import cached_table_path
    from vllm_longmamba.checkpoint.trusted_file import make_private_folder
    from vllm_longmamba.tables import save_table

    settings = ReleaseSettings(train_length, min_retention, clamp_percent, sequences)
    try:
        table = import_table(folder, open_model(model), settings)
        path = output or cached_table_path(table.metadata.weights_fingerprint)
        make_private_folder(path.parent) if output is None else path.parent.mkdir(parents=True, exist_ok=True)
        save_table(table, path)
    except (ValueError, OSError) as error:
        # Not markup: messages quote paths and keys, which may hold square brackets.
        console.print("[bold red]longmamba import-table:[/]", end=" ")
        console.print(str(error), markup=False)
        raise typer.Exit(1) from None
    channels = sum(len(layer.retention) for layer in table.layers.values())
    global_channels = table.count_global()
    console.print(
        f"wrote {path}: {len(table.layers)} layers, {global_channels} of {channels} channels global, "
        f"rows for {', '.join(str(length) for length in table.row_lengths[1:].tolist())} tokens",
        markup=False,
    )
