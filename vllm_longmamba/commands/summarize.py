"""The `longmamba summarize` command."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

console = Console(stderr=True)

_SOURCE, _MODEL, _PROMPT, _JOB, _FLEET = "Input and output", "Model", "Prompt and answer", "Job", "Server and Ray"


def summarize(
    inputs: Annotated[
        list[str],
        typer.Argument(
            help="Folders, files or patterns of .txt, .md, .html, .pdf, .jsonl, .parquet (also .gz, .zst), or -."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help=".jsonl or .parquet.", rich_help_panel=_SOURCE)],
    text_column: Annotated[str, typer.Option(help="Column with the document.", rich_help_panel=_SOURCE)] = "text",
    id_column: Annotated[
        str | None,
        typer.Option(help="Column with the id. [default: id if there is one, or file#row]", rich_help_panel=_SOURCE),
    ] = None,
    encoding: Annotated[str, typer.Option(help="Of text files.", rich_help_panel=_SOURCE)] = "utf-8",
    stdin_format: Annotated[
        str, typer.Option(help="What - is: jsonl, or text for one document.", rich_help_panel=_SOURCE)
    ] = "jsonl",
    max_bytes: Annotated[
        int, typer.Option(min=1, help="Larger documents become error rows.", rich_help_panel=_SOURCE)
    ] = 256 * 2**20,
    model: Annotated[
        str | None, typer.Option(help="Name or folder, as for vllm serve.", rich_help_panel=_MODEL)
    ] = None,
    table: Annotated[str | None, typer.Option(help="Threshold table.", rich_help_panel=_MODEL)] = None,
    min_retention: Annotated[
        float | None, typer.Option(help="Retention above which a channel is global.", rich_help_panel=_MODEL)
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Name or folder.", rich_help_panel=_MODEL)] = None,
    max_model_len: Annotated[
        int | None, typer.Option(min=2, help="Tokens of prompt and answer.", rich_help_panel=_MODEL)
    ] = None,
    dtype: Annotated[str, typer.Option(help="As for vllm serve.", rich_help_panel=_MODEL)] = "auto",
    tensor_parallel_size: Annotated[
        int, typer.Option("--tensor-parallel-size", "--tp", min=1, rich_help_panel=_MODEL)
    ] = 1,
    engine_args: Annotated[
        str,
        typer.Option(metavar="JSON", help="Further arguments of vLLM's engine.", rich_help_panel=_MODEL),
    ] = "{}",
    instruction: Annotated[
        str | None, typer.Option(help="What to do with each document. [default: summarize]", rich_help_panel=_PROMPT)
    ] = None,
    prompt: Annotated[
        str, typer.Option(help="base, chat, or auto: chat if there is a chat template.", rich_help_panel=_PROMPT)
    ] = "auto",
    template: Annotated[
        Path | None,
        typer.Option(help="Jinja file with {{ document }} and {{ instruction }}.", rich_help_panel=_PROMPT),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.", rich_help_panel=_PROMPT)] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, rich_help_panel=_PROMPT)] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, rich_help_panel=_PROMPT)] = 1.0,
    seed: Annotated[int, typer.Option(help="Of every request.", rich_help_panel=_PROMPT)] = 0,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends an answer; repeatable.", rich_help_panel=_PROMPT)
    ] = None,
    fit: Annotated[
        str, typer.Option(help="What does not fit: error, truncate or map-reduce.", rich_help_panel=_PROMPT)
    ] = "error",
    drop: Annotated[str, typer.Option(help="Truncate: what goes, end or middle.", rich_help_panel=_PROMPT)] = "end",
    reduce_instruction: Annotated[
        str | None,
        typer.Option(help="Map-reduce: instruction for the answers of sections.", rich_help_panel=_PROMPT),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume/--overwrite", help="Go on where OUT ends, or begin anew.", rich_help_panel=_JOB)
    ] = True,
    retry_errors: Annotated[bool, typer.Option(help="Try error rows again.", rich_help_panel=_JOB)] = False,
    concurrency: Annotated[
        int | None,
        typer.Option(min=1, help="Prompts at a time. [default: fills the engine; server: 64]", rich_help_panel=_JOB),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Look at so many records.", rich_help_panel=_JOB)] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Count documents, tokens, time, what will not fit.", rich_help_panel=_JOB),
    ] = False,
    sample: Annotated[
        int, typer.Option(min=0, help="Dry run: documents to time; 0 starts no engine.", rich_help_panel=_JOB)
    ] = 8,
    base_url: Annotated[
        str | None,
        typer.Option(help="An OpenAI-compatible server, up to /v1, instead of the engine.", rich_help_panel=_FLEET),
    ] = None,
    api_key: Annotated[
        str, typer.Option(envvar="OPENAI_API_KEY", show_envvar=True, show_default=False, rich_help_panel=_FLEET)
    ] = "none",
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for one answer.", rich_help_panel=_FLEET)] = 3600.0,
    retry_for: Annotated[
        float, typer.Option(min=0.0, help="Seconds that a server may be away.", rich_help_panel=_FLEET)
    ] = 600.0,
    ray: Annotated[
        str | None,
        typer.Option(help="Address of a Ray cluster, auto, or local to start one.", rich_help_panel=_FLEET),
    ] = None,
    replicas: Annotated[int, typer.Option(min=1, help="Engines on Ray.", rich_help_panel=_FLEET)] = 1,
    replica_resources: Annotated[
        str | None,
        typer.Option(metavar="JSON", help='Of a worker on Ray, such as {"GPU": 1}.', rich_help_panel=_FLEET),
    ] = None,
) -> None:
    """Summarize many long documents, or do with each what --instruction says. Resumable at any moment."""
    from vllm_longmamba.summarize.answering import Fit
    from vllm_longmamba.summarize.backends import Sampling
    from vllm_longmamba.summarize.job import run_job
    from vllm_longmamba.summarize.prompts import read_template
    from vllm_longmamba.summarize.records import JobStoppedError
    from vllm_longmamba.summarize.settings import JobSettings
    from vllm_longmamba.summarize.sources import SourceOptions

    try:
        settings = JobSettings(
            inputs=tuple(inputs),
            output=output,
            model=model,
            base_url=base_url,
            api_key=api_key,
            timeout_s=timeout,
            retry_for_s=retry_for,
            ray_address=ray,
            replicas=replicas,
            replica_resources=_json("--replica-resources", replica_resources) if replica_resources else None,
            tokenizer=tokenizer,
            table=table,
            min_retention=min_retention,
            max_model_len=max_model_len,
            dtype=dtype,
            tensor_parallel_size=tensor_parallel_size,
            engine_args=_json("--engine-args", engine_args),
            prompt_kind=prompt,
            instruction=instruction,
            template=read_template(template),
            fit=Fit(fit, drop, reduce_instruction),
            sampling=Sampling(max_tokens, temperature, top_p, seed, tuple(stop or ())),
            concurrency=concurrency,
            source=SourceOptions(text_column, id_column, max_bytes),
            encoding=encoding,
            stdin_format=stdin_format,
            limit=limit,
            overwrite=not resume,
            retry_errors=retry_errors,
        )
        if dry_run:
            from vllm_longmamba.summarize.dry_run import dry_run as run_dry

            run_dry(settings, sample, console)
            code = 0
        else:
            code = run_job(settings, console)
    except (ValueError, RuntimeError, OSError, ImportError, JobStoppedError) as error:
        console.print(f"[bold red]longmamba summarize:[/] {_escape(str(error))}")
        raise typer.Exit(1) from None
    raise typer.Exit(code)


def _json(option: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{option}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{option}: must be a JSON object, got {text!r}")
    return value


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
