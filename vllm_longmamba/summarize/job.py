"""One job from its settings to its exit code."""

import asyncio
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import chain, islice
from typing import Any

from rich.console import Console

from vllm_longmamba.summarize.admission import Admitted, admit
from vllm_longmamba.summarize.answering import Answerer, check_fit
from vllm_longmamba.summarize.backends import Backend
from vllm_longmamba.summarize.index import Index
from vllm_longmamba.summarize.inputs import Inputs
from vllm_longmamba.summarize.journal import DiskFullError, Journal
from vllm_longmamba.summarize.output import Output
from vllm_longmamba.summarize.progress import Progress
from vllm_longmamba.summarize.prompts import PromptMaker, has_chat_template
from vllm_longmamba.summarize.records import JobStoppedError
from vllm_longmamba.summarize.runner import Runner
from vllm_longmamba.summarize.settings import JobSettings
from vllm_longmamba.summarize.sources import read_records
from vllm_longmamba.summarize.starting import start_backend
from vllm_longmamba.summarize.texts import TextExtractor

# Exit codes beside 0 (every record has a row without an error), 1 (wrong settings) and 2 (wrong arguments).
EXIT_ERROR_ROWS = 3
EXIT_DISK_FULL = 4
EXIT_STOPPED = 5
EXIT_INTERRUPTED = 130


def run_job(settings: JobSettings, console: Console) -> int:
    """Run a job.

    Args:
        settings: what to do.
        console: for the progress and the closing report.

    Returns:
        Exit code.

    Raises:
        ValueError: the settings are wrong, do not fit the output, or the engine refuses them.
    """
    try:
        return asyncio.run(_run(settings, console))
    except DiskFullError as error:
        _say_disk_full(console, error)
        return EXIT_DISK_FULL
    except JobStoppedError as error:
        console.print(f"stopped: {error}\n{_RESUME}", style="bold red", highlight=False, markup=False, soft_wrap=True)
        return EXIT_STOPPED
    except KeyboardInterrupt:
        console.print(f"interrupted before the first document. {_RESUME}", highlight=False, soft_wrap=True)
        return EXIT_INTERRUPTED


_RESUME = "The same command goes on from here."


async def _run(settings: JobSettings, console: Console) -> int:
    output = Output(settings.output)
    inputs = Inputs(settings.inputs, settings.stdin_format, exclude=output.files())
    # Nobody knows which part of the bytes the first records are.
    progress = Progress(console, inputs.total_bytes if settings.limit is None else 0)
    with ExitStack() as cleanup:
        index = Index()
        cleanup.callback(index.close)
        journal = output.open(
            settings.answer_settings(), index, overwrite=settings.overwrite, retry_errors=settings.retry_errors
        )
        cleanup.callback(journal.close)
        admitted = admitted_records(settings, inputs, index, progress)
        # Where nothing is left to do, no engine is started for it.
        first = next(admitted, None)
        runner = None
        complete = True
        if first is not None:
            backend = await start_backend(settings, console)
            try:
                runner = make_runner(settings, backend, chain([first], admitted), journal, progress)
                complete = await _watched(runner, progress, console)
            finally:
                await backend.close()
        failure = runner.failure if runner is not None else None
        error_rows = 0
        if not isinstance(failure, DiskFullError):
            error_rows = output.finish(journal, complete=complete)
    return _report(output, error_rows, progress, complete, failure, console)


def admitted_records(settings: JobSettings, inputs: Inputs, index: Index, progress: Progress) -> Iterator[Admitted]:
    """The records that a job still has to answer."""
    records = islice(read_records(inputs, settings.source), settings.limit)
    return admit(records, index, settings.answer_hash(), progress)


def make_maker(settings: JobSettings, tokenizer: Any) -> PromptMaker:
    """The prompts of a job.

    Raises:
        ValueError: the template is wrong, or chat is asked of a model without a chat template.
    """
    chat = settings.prompt_kind == "chat"
    if settings.prompt_kind == "auto":
        # Without a tokenizer, chat is what every OpenAI-compatible server has.
        chat = tokenizer is None or has_chat_template(tokenizer)
    elif chat and tokenizer is not None and settings.base_url is None and not has_chat_template(tokenizer):
        raise ValueError(f"--prompt chat: the tokenizer of {settings.model} has no chat template")
    if chat and tokenizer is not None and not has_chat_template(tokenizer):
        # The server has one of its own, which nobody can count with.
        tokenizer = None
    return PromptMaker(chat, settings.instruction, settings.template, tokenizer)


def max_prompt_tokens(settings: JobSettings, backend_length: int | None) -> int | None:
    """Tokens that a prompt may have beside its answer; None where nobody knows.

    Raises:
        ValueError: none are left.
    """
    length = settings.max_model_len if settings.max_model_len is not None else backend_length
    if length is None:
        return None
    if length <= settings.sampling.max_tokens:
        raise ValueError(f"--max-tokens {settings.sampling.max_tokens} leaves no room for a prompt in {length} tokens")
    return length - settings.sampling.max_tokens


def make_runner(
    settings: JobSettings, backend: Backend, admitted: Iterator[Admitted], journal: Journal, progress: Progress
) -> Runner:
    """The loop of a job.

    Raises:
        ValueError: the settings do not suit the backend.
    """
    maker = make_maker(settings, backend.tokenizer)
    backend.chat = maker.chat
    limit = max_prompt_tokens(settings, backend.max_model_len)
    check_fit(settings.fit, maker, settings.sampling.max_tokens, limit)
    answerer = Answerer(backend, settings.fit, settings.sampling.max_tokens, limit)
    return Runner(admitted, answerer, maker, TextExtractor(settings.encoding), journal, progress, backend.concurrency)


async def _watched(runner: Runner, progress: Progress, console: Console) -> bool:
    """Run the loop; the first interrupt lets it finish what is under way, the second ends it."""
    loop = asyncio.get_running_loop()
    interrupts = 0

    def interrupt() -> None:
        nonlocal interrupts
        interrupts += 1
        if interrupts == 1:
            console.print(f"finishing {runner.under_way} documents; once more drops them", highlight=False)
            runner.stop()
        else:
            runner.abort()

    signals = (signal.SIGINT, signal.SIGTERM)
    for number in signals:
        loop.add_signal_handler(number, interrupt)
    progress.begin()
    try:
        return await runner.run()
    finally:
        progress.end()
        for number in signals:
            loop.remove_signal_handler(number)


def _report(
    output: Output,
    error_rows: int,
    progress: Progress,
    complete: bool,
    failure: JobStoppedError | DiskFullError | None,
    console: Console,
) -> int:
    for line in progress.report():
        console.print(line, highlight=False, soft_wrap=True)
    if isinstance(failure, DiskFullError):
        _say_disk_full(console, failure)
        return EXIT_DISK_FULL
    if isinstance(failure, JobStoppedError):
        console.print(f"stopped: {failure}\n{_RESUME}", style="bold red", highlight=False, markup=False, soft_wrap=True)
        return EXIT_STOPPED
    if not complete:
        where = f"the answers so far are in {output.journal_path}. " if output.is_parquet else ""
        console.print(f"interrupted; {where}{_RESUME}", highlight=False, soft_wrap=True)
        return EXIT_INTERRUPTED
    console.print(f"complete: {output.path}", highlight=False)
    if error_rows:
        console.print(f"it has {error_rows:,} error rows; --retry-errors tries them again", highlight=False)
        return EXIT_ERROR_ROWS
    return 0


def _say_disk_full(console: Console, error: DiskFullError) -> None:
    console.print(
        f"disk full: {error}. Every row written so far is whole. Make room; then the same command goes on from here.",
        style="bold red",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
