"""One job from its settings to its exit code."""

import asyncio
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from itertools import chain, count, islice
from typing import Any

from blake3 import blake3
from rich.console import Console

from vllm_longmamba.summarize.answering import Answerer, Backend, check_fit
from vllm_longmamba.summarize.inputs import Inputs
from vllm_longmamba.summarize.progress import Progress, say
from vllm_longmamba.summarize.prompts import PromptMaker, has_chat_template
from vllm_longmamba.summarize.records import DiskFullError, JobStoppedError, Row
from vllm_longmamba.summarize.runner import Admitted, Runner
from vllm_longmamba.summarize.settings import JobSettings
from vllm_longmamba.summarize.sources import read_records
from vllm_longmamba.summarize.store import Store, Verdict
from vllm_longmamba.summarize.texts import TextExtractor

# Exit codes beside 0 (every record has a row without an error), 1 (wrong settings) and 2 (wrong arguments).
EXIT_ERROR_ROWS = 3
EXIT_DISK_FULL = 4
EXIT_STOPPED = 5
EXIT_INTERRUPTED = 130
_RESUME = "The same command goes on from here."

# Makes the block that an engine is started in.
Starting = Callable[[], AbstractContextManager[None]]


def run_job(settings: JobSettings, console: Console, starting: Starting = nullcontext) -> int:
    """Run a job.

    Args:
        settings: what to do.
        console: for the progress and the closing report.
        starting: makes a context in which the engine is started.

    Returns:
        Exit code.

    Raises:
        ValueError: the settings are wrong, do not fit the output, or the engine refuses them.
    """
    progress = Progress(console)
    try:
        complete, error_rows = asyncio.run(_run(settings, progress, console, starting))
    except DiskFullError as error:
        _report(progress, console)
        more = "Every row written so far is whole. Make room; then the same command goes on from here."
        say(console, f"disk full: {error}. {more}", "bold red")
        return EXIT_DISK_FULL
    except JobStoppedError as error:
        _report(progress, console)
        say(console, f"stopped: {error}\n{_RESUME}", "bold red")
        return EXIT_STOPPED
    except KeyboardInterrupt:
        complete, error_rows = False, 0
    _report(progress, console)
    if not complete:
        say(console, f"interrupted; the rows so far are in {settings.output}. {_RESUME}")
        return EXIT_INTERRUPTED
    say(console, f"complete: {settings.output}")
    if error_rows:
        say(console, f"it has {error_rows:,} error rows; --retry-errors tries them again")
        return EXIT_ERROR_ROWS
    return 0


async def _run(settings: JobSettings, progress: Progress, console: Console, starting: Starting) -> tuple[bool, int]:
    """(whether every record has a row, number of error rows)."""
    again = {"overwrite": settings.overwrite, "retry_errors": settings.retry_errors}
    with closing(Store(settings.output, settings.answer_settings(), **again)) as store:
        inputs = Inputs(settings.inputs, settings.stdin_format, exclude=store.files())
        # Nobody knows which part of the bytes the first records are.
        progress.total_bytes = inputs.total_bytes if settings.limit is None else 0
        admitted = admitted_records(settings, inputs, store, progress)
        complete, failure = True, None
        # Where nothing is left to do, no engine is started for it.
        if (first := next(admitted, None)) is not None:
            runner, close = await _start(settings, chain([first], admitted), store, progress, console, starting)
            try:
                complete = await _watched(runner, progress, console)
            finally:
                if close is not None:
                    await close()
            failure = runner.failure
        if not isinstance(failure, DiskFullError):
            store.export()
        if failure is not None:
            raise failure
        return complete, store.count(failed=True)


def admitted_records(settings: JobSettings, inputs: Inputs, store: Store, progress: Progress) -> Iterator[Admitted]:
    """The records that a job still has to answer.

    A second record with the id of another one gets an error row under an id of its own; the same content under the same
    id is one record.

    Raises:
        DiskFullError: no room for temporary files.
    """
    numbers, settings_hash = count(1), settings.answer_hash()
    for record in islice(read_records(inputs, settings), settings.limit):
        # A file name or a row may hold what cannot be written as UTF-8.
        record = replace(record, id=record.id.encode("utf-8", "backslashreplace").decode())
        content_hash = blake3(settings_hash + record.digest).hexdigest(16)
        verdict = store.admit(record.id, content_hash)
        if verdict is Verdict.CLASHING:
            error = f"duplicate id: {record.id!r} was seen before with another text"
            record = replace(record, id=f"{record.id} ({record.where})", content=b"", error=error)
            verdict = store.admit(record.id, content_hash)
        if verdict is Verdict.NEW:
            yield Admitted(record, Row(record.id, content_hash), next(numbers))
        else:
            progress.skipped(record.weight, repeated=verdict is not Verdict.DONE)


async def start_backend(settings: JobSettings, console: Console, starting: Starting) -> Backend:
    """Start the engine, or reach the server.

    Raises:
        ValueError: vLLM refuses the arguments.
        JobStoppedError: the server cannot be reached.
    """
    if settings.base_url is not None:
        from vllm_longmamba.summarize.server import connected

        return await connected(settings, lambda text: say(console, text))
    from vllm_longmamba.summarize.engine import EngineBackend

    say(console, f"starting the engine with {settings.model}")
    with starting():
        return EngineBackend(settings.engine, settings.sampling, settings.concurrency)


def make_answerer(
    settings: JobSettings, tokenizer: Any, length: int | None
) -> tuple[Answerer, PromptMaker, int | None]:
    """(who knows the prompts of documents, who makes them, tokens that a prompt may have or None).

    Args:
        settings: of the job.
        tokenizer: of the model, or None.
        length: tokens of prompt and answer that the backend takes, or None.

    Raises:
        ValueError: the settings do not suit the backend.
    """
    maker = make_maker(settings, tokenizer)
    max_tokens = settings.sampling.max_tokens
    length = settings.max_model_len if settings.max_model_len is not None else length
    if length is not None and length <= max_tokens:
        raise ValueError(f"--max-tokens {max_tokens} leaves no room for a prompt in {length} tokens")
    limit = None if length is None else length - max_tokens
    check_fit(settings.fit, maker, max_tokens, limit)
    return Answerer(maker, settings.fit, max_tokens, limit), maker, limit


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


async def _start(
    settings: JobSettings,
    admitted: Iterator[Admitted],
    store: Store,
    progress: Progress,
    console: Console,
    starting: Starting,
) -> tuple[Any, Any]:
    """(the loop of a job, what ends its backend)."""
    extractor = TextExtractor(settings.encoding, settings.max_bytes, settings.timeout_s)
    if settings.ray_address is not None:
        from vllm_longmamba.summarize.engine import tokenizer_and_length
        from vllm_longmamba.summarize.ray_data import RayRunner

        with starting():
            tokenizer, length = tokenizer_and_length(settings.engine)
        answerer, _, _ = make_answerer(settings, tokenizer, length)
        say(console, f"starting {settings.replicas} engines on Ray ({settings.ray_address})")
        return RayRunner(admitted, answerer, extractor, tokenizer, settings, store, progress), None
    backend = await start_backend(settings, console, starting)
    try:
        answerer, maker, _ = make_answerer(settings, backend.tokenizer, backend.max_model_len)
        backend.chat = maker.chat
        return Runner(admitted, answerer, extractor, backend, store, progress), backend.close
    except BaseException:
        await backend.close()
        raise


async def _watched(runner: Any, progress: Progress, console: Console) -> bool:
    """Run the loop; the first interrupt lets it finish what is under way, the second ends it."""
    loop = asyncio.get_running_loop()
    interrupts = count(1)

    def interrupt() -> None:
        if next(interrupts) == 1:
            say(console, f"finishing {runner.under_way} documents; once more drops them")
            runner.stop()
        else:
            runner.abort()

    signals = (signal.SIGINT, signal.SIGTERM)
    for number in signals:
        loop.add_signal_handler(number, interrupt)
    progress.begin()
    try:
        return bool(await runner.run())
    finally:
        progress.end()
        for number in signals:
            loop.remove_signal_handler(number)


def _report(progress: Progress, console: Console) -> None:
    for line in progress.report():
        say(console, line)
