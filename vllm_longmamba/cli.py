"""The `longmamba` command: everything that is not vLLM's own command line."""

from typing import Annotated

import typer

from vllm_longmamba import __version__
from vllm_longmamba.commands import evaluate
from vllm_longmamba.commands.calibrate import calibrate
from vllm_longmamba.commands.doctor import doctor
from vllm_longmamba.commands.inspect import inspect
from vllm_longmamba.commands.lm_eval import longbench_e, ruler
from vllm_longmamba.commands.summarize import summarize
from vllm_longmamba.commands.tune import tune

app = typer.Typer(
    help="Tools for serving Mamba models on long prompts with vLLM (vllm serve MODEL --model-impl longmamba).",
    no_args_is_help=True,
    add_completion=False,
    # A traceback must not show a key or a password.
    pretty_exceptions_show_locals=False,
)
app.command()(calibrate)
evaluate.app.command()(ruler)
evaluate.app.command("longbench-e")(longbench_e)
app.add_typer(evaluate.app, name="eval")
# What follows the model are vLLM's arguments.
app.command(context_settings={"ignore_unknown_options": True})(doctor)
app.command()(inspect)
app.command()(summarize)
app.command()(tune)


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
