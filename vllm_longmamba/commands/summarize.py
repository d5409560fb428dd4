"""The `longmamba summarize` command."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from vllm_longmamba.commands.engine_errors import explained_start
from vllm_longmamba.commands.engine_options import EngineOptions, engine_arguments, with_engine_options

_SOURCE, _PROMPT, _JOB, _FLEET = "Input and output", "Prompt and answer", "Job", "Server and Ray"


def _option(text: str, panel: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, **more)


@with_engine_options()
def summarize(
    inputs: Annotated[
        list[str],
        typer.Argument(
            help="Folders, files or patterns of .txt, .md, .html, .pdf, .jsonl and .parquet files (all but .parquet "
            "also with .gz or .zst), or - for standard input."
        ),
    ],
    output: Annotated[Path, _option("Output file: its name ends with .jsonl or .parquet.", _SOURCE, "--output", "-o")],
    engine: EngineOptions,
    text_column: Annotated[str, _option("Name of the column that holds the document.", _SOURCE)] = "text",
    id_column: Annotated[
        str | None,
        _option("Name of the column that holds the id. (default: id where a row has one, else file#row)", _SOURCE),
    ] = None,
    encoding: Annotated[str, _option("Encoding of text files.", _SOURCE)] = "utf-8",
    max_bytes: Annotated[
        int, _option("Maximum number of bytes in a document; larger ones become error rows.", _SOURCE, min=1)
    ] = 256 * 2**20,
    model: Annotated[
        str | None, _option("Name or folder of the model, as for vllm serve.", "Engine", show_default=False)
    ] = None,
    instruction: Annotated[
        str | None, _option("What to do with each document. (default: summarize it)", _PROMPT)
    ] = None,
    prompt: Annotated[
        Literal["auto", "base", "chat"],
        _option("Kind of prompt: base, chat, or auto (chat if there is a chat template).", _PROMPT),
    ] = "auto",
    template: Annotated[
        typer.FileText | None, _option("Jinja file of the prompt, with {{ document }} and {{ instruction }}.", _PROMPT)
    ] = None,
    max_tokens: Annotated[int, _option("Maximum number of tokens in an answer.", _PROMPT, min=1)] = 256,
    temperature: Annotated[
        float, _option("Temperature of the sampling; 0 takes the likeliest token.", _PROMPT, min=0.0)
    ] = 0.0,
    top_p: Annotated[float, _option("Share of the probability that is sampled from.", _PROMPT, min=0.0, max=1.0)] = 1.0,
    seed: Annotated[int, _option("Seed of every request.", _PROMPT)] = 0,
    stop: Annotated[list[str] | None, _option("Text that ends an answer; repeatable.", _PROMPT)] = None,
    fit: Annotated[
        Literal["error", "truncate", "map-reduce"], _option("What happens to a document that does not fit.", _PROMPT)
    ] = "error",
    drop: Annotated[Literal["end", "middle"], _option("What --fit truncate cuts off.", _PROMPT)] = "end",
    reduce_instruction: Annotated[
        str | None,
        _option("What --fit map-reduce does with the answers of sections. (default: --instruction)", _PROMPT),
    ] = None,
    resume: Annotated[
        bool, _option("Go on where the output ends, or begin it anew.", _JOB, "--resume/--overwrite")
    ] = True,
    retry_errors: Annotated[bool, _option("Try documents with error rows again.", _JOB, "--retry-errors")] = False,
    concurrency: Annotated[
        int | None,
        _option("Number of prompts under way at a time. (default: fills the engine; server: 64)", _JOB, min=1),
    ] = None,
    limit: Annotated[int | None, _option("Number of records to look at. (default: all)", _JOB, min=1)] = None,
    dry_run: Annotated[
        bool, _option("Count documents, tokens, time, and what will not fit; write nothing.", _JOB, "--dry-run")
    ] = False,
    sample: Annotated[
        int, _option("Number of documents that a dry run answers to measure time; 0 starts no engine.", _JOB, min=0)
    ] = 8,
    base_url: Annotated[
        str | None, _option("Address of an OpenAI-compatible server, up to and with /v1.", _FLEET)
    ] = None,
    api_key: Annotated[
        str | None, _option("Key for the server.", _FLEET, envvar="OPENAI_API_KEY", show_default=False)
    ] = None,
    timeout: Annotated[float, _option("Seconds that one answer may take in all.", _FLEET, min=0.1)] = 3600.0,
    retry_for: Annotated[float, _option("Seconds that the server may be away.", _FLEET, min=0.0)] = 600.0,
    ray: Annotated[
        str | None, _option("Address of a Ray cluster, auto, or local to start one on this machine.", _FLEET)
    ] = None,
    replicas: Annotated[int, _option("Number of engines on Ray.", _FLEET, min=1)] = 1,
) -> None:
    """Summarize many long documents, or do with each what --instruction says. Resumable at any moment."""
    from vllm_longmamba.summarize.dry_run import dry_run as run_dry
    from vllm_longmamba.summarize.job import run_job
    from vllm_longmamba.summarize.progress import say
    from vllm_longmamba.summarize.records import DiskFullError, JobStoppedError
    from vllm_longmamba.summarize.settings import Fit, JobSettings, Sampling

    console = Console(stderr=True)
    try:
        settings = JobSettings(
            inputs=tuple(inputs),
            output=output,
            engine=engine_arguments(str(model), engine, stock_vllm=True) if base_url is None else {},
            model=model,
            base_url=base_url,
            api_key=api_key,
            timeout_s=timeout,
            retry_for_s=retry_for,
            ray_address=ray,
            replicas=replicas,
            tokenizer=engine.tokenizer,
            max_model_len=engine.max_model_len,
            prompt_kind=prompt,
            instruction=instruction,
            template=template.read() if template is not None else None,
            fit=Fit(fit, drop, reduce_instruction),
            sampling=Sampling(max_tokens, temperature, top_p, seed, tuple(stop or ())),
            concurrency=concurrency,
            text_column=text_column,
            id_column=id_column,
            max_bytes=max_bytes,
            encoding=encoding,
            limit=limit,
            overwrite=not resume,
            retry_errors=retry_errors,
        )
        starting = partial(explained_start, engine.verbose)
        if dry_run:
            run_dry(settings, sample, console, starting)
            code = 0
        else:
            code = run_job(settings, console, starting)
    except (ValueError, RuntimeError, OSError, ImportError, JobStoppedError, DiskFullError) as error:
        say(console, f"longmamba summarize: {error}", "bold red")
        raise typer.Exit(1) from None
    raise typer.Exit(code)
