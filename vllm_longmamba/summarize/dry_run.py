"""What a job would do: documents, tokens, what does not fit, and how long it would take."""

import asyncio
import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import track

from vllm_longmamba.summarize.answering import Backend
from vllm_longmamba.summarize.fitting import too_long
from vllm_longmamba.summarize.inputs import Inputs
from vllm_longmamba.summarize.job import Starting, admitted_records, make_answerer, start_backend
from vllm_longmamba.summarize.progress import Progress, counts, duration, say
from vllm_longmamba.summarize.prompts import Prompt, PromptMaker
from vllm_longmamba.summarize.records import RecordError
from vllm_longmamba.summarize.runner import Admitted
from vllm_longmamba.summarize.settings import JobSettings
from vllm_longmamba.summarize.store import Store
from vllm_longmamba.summarize.texts import TextExtractor

_IDS_SHOWN = 10


@dataclass
class _Forecast:
    """What the input holds; `sections` are the prompts that map-reduce would make, roughly."""

    documents: int = 0
    tokens: int = 0
    characters: int = 0
    longest: int = 0
    sections: int = 0
    too_long: list[tuple[str, int]] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    sample: list[Prompt] = field(default_factory=list)


def dry_run(settings: JobSettings, sample: int, console: Console, starting: Starting = nullcontext) -> None:
    """Count everything, answer a few documents to measure the speed, and say what the job would take.

    Args:
        settings: of the job; nothing is written.
        sample: documents to answer; 0 starts no engine and tells no time.
        console: for the result.
        starting: makes a context in which the engine is started.

    Raises:
        ValueError: wrong settings.
        JobStoppedError: the server cannot be reached.
    """
    asyncio.run(_dry_run(settings, sample, console, starting))


async def _dry_run(settings: JobSettings, sample: int, console: Console, starting: Starting) -> None:
    with closing(Store(settings.output, overwrite=settings.overwrite)) as store:
        inputs = Inputs(settings.inputs, settings.stdin_format, exclude=store.files())
        progress = Progress(console)
        if settings.ray_address is not None and sample:
            say(console, "no engine is started on Ray to measure the time")
            sample = 0
        backend: Backend | None = None
        if sample or settings.base_url is not None:
            backend = await start_backend(settings, console, starting)
            tokenizer, length = backend.tokenizer, backend.max_model_len
        else:
            from vllm_longmamba.summarize.engine import tokenizer_and_length

            with starting():
                tokenizer, length = tokenizer_and_length(settings.engine)
        try:
            _, maker, limit = make_answerer(settings, tokenizer, length)
            admitted = admitted_records(settings, inputs, store, progress)
            shown = track(admitted, "reading", console=console, transient=True) if console.is_terminal else admitted
            with closing(TextExtractor(settings.encoding, settings.max_bytes, settings.timeout_s)) as extractor:
                forecast = await _take_stock(iter(shown), maker, extractor, limit, sample)
            _say_what(forecast, inputs, progress, settings, limit, console)
            if backend is not None and forecast.sample:
                backend.chat = maker.chat
                rate = await _measured_rate(backend, forecast.sample)
                say(
                    console,
                    f"about {duration(forecast.characters / rate)}, from {len(forecast.sample)} documents answered at "
                    f"{rate:,.0f} characters/s",
                )
        finally:
            if backend is not None:
                await backend.close()


async def _take_stock(
    admitted: Iterator[Admitted], maker: PromptMaker, extractor: TextExtractor, limit: int | None, sample: int
) -> _Forecast:
    forecast = _Forecast()
    for each in admitted:
        try:
            prompt = maker.prompt(await extractor.text(each.record))
        except RecordError as error:
            forecast.errors[str(error).partition(":")[0]] += 1
            continue
        tokens = len(prompt.token_ids or [])
        forecast.documents += 1
        forecast.tokens += tokens
        forecast.characters += len(prompt.text)
        forecast.longest = max(forecast.longest, tokens)
        if limit is not None and too_long(prompt, limit):
            forecast.sections += math.ceil(tokens / limit)
            forecast.too_long.append((each.record.id, tokens))
        elif len(forecast.sample) < sample:
            forecast.sample.append(prompt)
    return forecast


async def _measured_rate(backend: Backend, sample: list[Prompt]) -> float:
    """Characters of prompts per second, answers included, a few prompts at a time."""
    # The first answer pays for what is compiled or loaded late.
    await backend.complete(sample[0])
    started = time.monotonic()
    await asyncio.gather(*(backend.complete(prompt) for prompt in sample))
    return sum(len(prompt.text) for prompt in sample) / (time.monotonic() - started)


def _say_what(
    forecast: _Forecast, inputs: Inputs, progress: Progress, settings: JobSettings, limit: int | None, console: Console
) -> None:
    prompts = f"{forecast.tokens:,} prompt tokens (longest {forecast.longest:,})"
    if forecast.documents and not forecast.tokens:
        prompts = f"{forecast.characters:,} characters of prompts (nobody here can count tokens; see --tokenizer)"
    lines = [
        f"{inputs.total_files:,} files, {forecast.documents:,} documents to answer, {prompts}, "
        f"up to {forecast.documents * settings.sampling.max_tokens:,} output tokens"
    ]
    if progress.done_before:
        lines.append(f"{progress.done_before:,} done before")
    if progress.repetitions:
        lines.append(f"{progress.repetitions:,} left out: the same id and text once more")
    if forecast.too_long:
        would = {
            "error": "would be error rows (see --fit)",
            "truncate": "would be cut off",
            "map-reduce": f"would take {forecast.sections:,} sections or more",
        }[settings.fit.mode]
        lines.append(f"{len(forecast.too_long):,} do not fit in {limit:,} prompt tokens and {would}:")
        lines += [f"  {tokens:>10,}  {record_id}" for record_id, tokens in forecast.too_long[:_IDS_SHOWN]]
        if len(forecast.too_long) > _IDS_SHOWN:
            lines.append(f"  and {len(forecast.too_long) - _IDS_SHOWN:,} more")
    if forecast.errors:
        lines.append(f"{forecast.errors.total():,} cannot be read: {counts(forecast.errors)}")
    for line in lines:
        say(console, line)
