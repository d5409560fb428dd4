"""One job from its settings to its exit code."""

import asyncio
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, AsyncExitStack, closing, nullcontext
from dataclasses import replace
from itertools import chain, count, islice

from blake3 import blake3
from rich.console import Console

from vllm_longmamba.summarize.answering import Answerer, Backend, make_answerer
from vllm_longmamba.summarize.inputs import Inputs
from vllm_longmamba.summarize.progress import Progress, say
from vllm_longmamba.summarize.records import Admitted, DiskFullError, JobStoppedError, Row
from vllm_longmamba.summarize.runner import Runner, next_record
from vllm_longmamba.summarize.settings import JobSettings
from vllm_longmamba.summarize.sources import read_records
from vllm_longmamba.summarize.store import Store, Verdict
from vllm_longmamba.summarize.texts import TextExtractor
from vllm_longmamba.summarize.watchdog import Watchdog

# Exit codes beside 0 (every record has a row without an error), 1 (wrong settings) and 2 (wrong arguments).
EXIT_ERROR_ROWS = 3
EXIT_DISK_FULL = 4
EXIT_STOPPED = 5
EXIT_INTERRUPTED = 130
_RESUME = "The same command goes on from here."

# Makes the block that an engine is started in.
Starting = Callable[[], AbstractContextManager[None]]


def run_job(settings: JobSettings, console: Console, starting: Starting = nullcontext) -> int:
    """Run a job; its exit code.

    Raises:
        ValueError: the settings are wrong, do not fit the output, or the engine refuses them.
    """
    progress = Progress(console)
    try:
        code, text = asyncio.run(_run(settings, progress, starting))
    except DiskFullError as error:
        more = "Every row written so far is whole. Make room; then the same command goes on from here."
        code, text = EXIT_DISK_FULL, f"disk full: {error}. {more}"
    except JobStoppedError as error:
        code, text = EXIT_STOPPED, f"stopped: {error}\n{_RESUME}"
    except KeyboardInterrupt:
        code, text = EXIT_INTERRUPTED, _interrupted(settings)
    for line in progress.report():
        say(console, line)
    say(console, text, "bold red" if code in (EXIT_DISK_FULL, EXIT_STOPPED) else None)
    return code


async def _run(settings: JobSettings, progress: Progress, starting: Starting) -> tuple[int, str]:
    """(exit code, closing words)."""
    again = {"overwrite": settings.overwrite, "retry_errors": settings.retry_errors}
    with closing(Store(settings.output, settings.answer_settings(), **again)) as store:
        inputs = Inputs(settings.inputs, exclude=store.files())
        # Nobody knows which part of the bytes the first records are.
        progress.total_bytes = inputs.total_bytes if settings.limit is None else 0
        admitted = admitted_records(settings, inputs, store, progress)
        complete = True
        # Where nothing is left to do, no engine is started for it.
        # Ctrl-C ends the search, which may pass over many documents first, or wait for standard input.
        if (first := await next_record(admitted)) is not None:
            try:
                complete = await _answer(settings, chain([first], admitted), store, progress, starting)
            except JobStoppedError:
                store.export()
                raise
        if complete:
            store.begin()
        store.export()
        if not complete:
            return EXIT_INTERRUPTED, _interrupted(settings)
        text = f"complete: {settings.output}"
        if errors := store.count(failed=True):
            return EXIT_ERROR_ROWS, f"{text}\nit has {errors:,} error rows; --retry-errors tries them again"
        return 0, text


def _interrupted(settings: JobSettings) -> str:
    return f"interrupted; the rows so far are in {settings.output}. {_RESUME}"


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
            yield Admitted(record, Row(record.id, hash=content_hash), next(numbers))
        else:
            progress.skipped(record.weight, repeated=verdict is not Verdict.DONE)


async def start_backend(
    stack: AsyncExitStack, settings: JobSettings, console: Console, starting: Starting
) -> tuple[Backend, Answerer]:
    """Reach the server or the cluster, or start an engine here; who answers prompts, and who knows them.

    Raises:
        ValueError: vLLM refuses the arguments, or the settings do not suit the model.
        JobStoppedError: the server or the cluster cannot be reached.
    """
    backend: Backend
    if settings.base_url is not None:
        from vllm_longmamba.summarize.server import ServerBackend

        backend = server = ServerBackend(settings)
        stack.push_async_callback(server.close)
        await server.connect(console)
    elif settings.ray_address is not None:
        from vllm_longmamba.summarize.ray_data import RayBackend

        say(console, f"starting {settings.replicas} engines on Ray ({settings.ray_address})")
        with starting():
            backend = ray = RayBackend(settings)
        stack.push_async_callback(ray.close)
        ray.connect()
    else:
        from vllm_longmamba.summarize.engine import EngineBackend

        say(console, f"starting the engine with {settings.model}")
        with starting():
            backend = EngineBackend(settings.engine, settings.sampling, settings.concurrency)
        stack.push_async_callback(backend.close)
    return backend, make_answerer(settings, backend.tokenizer, backend.max_model_len)


async def _answer(
    settings: JobSettings, admitted: Iterator[Admitted], store: Store, progress: Progress, starting: Starting
) -> bool:
    """Start what answers, and the watchdog over it, and answer the records; whether all of them have a row now.

    The first interrupt lets what is under way finish, the second drops it.
    """
    async with AsyncExitStack() as stack:
        watchdog = Watchdog()
        if settings.ray_address is None:
            # On Ray it waits for the end of this process, and ends what Ray leaves of a cluster on this machine.
            stack.callback(watchdog.stop)
        extractor = TextExtractor(settings.encoding, settings.max_bytes, settings.timeout_s)
        backend, answerer = await start_backend(stack, settings, progress.console, starting)
        runner = Runner(admitted, answerer, extractor, backend, store, progress)
        interrupts = count(1)

        def interrupt() -> None:
            if next(interrupts) == 1:
                say(progress.console, f"finishing {runner.under_way} documents; once more drops them")
                runner.stop()
            else:
                runner.abort()

        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            # Until the loop is closed: the engine has to be ended, and the output to be written, after the last row.
            loop.add_signal_handler(number, interrupt)
        progress.begin()
        stack.callback(progress.end)
        return await runner.run()
