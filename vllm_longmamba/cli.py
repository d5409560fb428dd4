"""The `longmamba` command: everything that is not vLLM's own command line."""

from typing import Annotated

import typer

from vllm_longmamba import __version__
from vllm_longmamba.commands.calibrate import calibrate

app = typer.Typer(
    help="Tools for serving Mamba models on long prompts with vLLM (vllm serve MODEL --model-impl longmamba).",
    no_args_is_help=True,
    add_completion=False,
)
app.command()(calibrate)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vllm-longmamba {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass
