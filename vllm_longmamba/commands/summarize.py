"""The `longmamba summarize` command."""

import asyncio
from dataclasses import replace
from functools import partial
from typing import Annotated

import typer
from rich.console import Console

from vllm_longmamba.commands.engine_errors import explained_start
from vllm_longmamba.commands.engine_options import EngineOptions, engine_arguments, with_options
from vllm_longmamba.summarize.settings import Fit, JobSettings, Sampling


@with_options(settings=JobSettings, fit=Fit, sampling=Sampling, engine=EngineOptions)
def summarize(
    settings: JobSettings,
    fit: Fit,
    sampling: Sampling,
    engine: EngineOptions,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Count documents, tokens, and what will not fit; write nothing.", rich_help_panel="Job"
        ),
    ] = False,
) -> None:
    """Summarize many long documents, or do with each what --instruction says. Resumable at any moment."""
    try:
        from vllm_longmamba.summarize.dry_run import dry_run as count
        from vllm_longmamba.summarize.job import run_job
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} not installed; run pip install 'vllm-longmamba[summarize]'") from None

    settings = replace(
        settings,
        fit=fit,
        sampling=sampling,
        engine=engine_arguments(str(settings.model), engine, stock_vllm=True) if settings.base_url is None else {},
        tokenizer=engine.tokenizer,
        max_model_len=engine.max_model_len,
    )
    console, starting = Console(stderr=True), partial(explained_start, engine.verbose)
    if dry_run:
        asyncio.run(count(settings, console, starting))
    else:
        raise typer.Exit(run_job(settings, console, starting))
