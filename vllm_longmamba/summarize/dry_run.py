"""What a job would do: documents, tokens, what does not fit, and how long it would take."""

import asyncio
import math
import time
from collections import Counter
from contextlib import AsyncExitStack, closing, nullcontext

from rich.console import Console
from rich.progress import track

from vllm_longmamba.summarize.answering import Answerer, Backend, make_answerer
from vllm_longmamba.summarize.inputs import Inputs
from vllm_longmamba.summarize.job import Starting, admitted_records, start_backend
from vllm_longmamba.summarize.progress import Progress, duration, listed, say
from vllm_longmamba.summarize.prompts import Prompt
from vllm_longmamba.summarize.records import RecordError
from vllm_longmamba.summarize.settings import JobSettings
from vllm_longmamba.summarize.store import Store
from vllm_longmamba.summarize.texts import TextExtractor

_IDS_SHOWN = 10


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
    if settings.ray_address is not None and sample:
        say(console, "no engine is started on Ray to measure the time")
        sample = 0
    async with AsyncExitStack() as stack:
        store = stack.enter_context(closing(Store(settings.output, overwrite=settings.overwrite)))
        inputs = Inputs(settings.inputs, exclude=store.files())
        backend: Backend | None = None
        if sample or settings.base_url is not None:
            backend, answerer = await start_backend(stack, settings, console, starting)
        else:
            from vllm_longmamba.summarize.engine import tokenizer_and_length

            with starting():
                answerer = make_answerer(settings, *tokenizer_and_length(settings.engine))
        prompts, characters = await _count(settings, inputs, store, answerer, sample, console)
        if backend is not None and prompts:
            # The first answer pays for what is compiled or loaded late.
            await backend.complete(prompts[0])
            started = time.monotonic()
            await asyncio.gather(*map(backend.complete, prompts))
            rate = sum(len(prompt.text) for prompt in prompts) / (time.monotonic() - started)
            text = f"about {duration(characters / rate)}, from {len(prompts)} documents answered at "
            say(console, f"{text}{rate:,.0f} characters/s")


async def _count(
    settings: JobSettings, inputs: Inputs, store: Store, answerer: Answerer, sample: int, console: Console
) -> tuple[list[Prompt], int]:
    """Say what the input holds; prompts for a sample, and characters of all prompts."""
    progress = Progress(console)
    documents = tokens = characters = longest = sections = 0
    too_long: list[str] = []
    errors: Counter[str] = Counter()
    prompts: list[Prompt] = []
    admitted = admitted_records(settings, inputs, store, progress)
    with closing(TextExtractor(settings.encoding, settings.max_bytes, settings.timeout_s)) as extractor:
        for each in track(admitted, "reading", console=console, transient=True, disable=not console.is_terminal):
            try:
                prompt = answerer.maker.prompt(await extractor.text(each.record))
            except RecordError as error:
                errors[str(error).partition(":")[0]] += 1
                continue
            documents += 1
            tokens += prompt.tokens
            characters += len(prompt.text)
            longest = max(longest, prompt.tokens)
            if answerer.limit is not None and not answerer.fits(prompt):
                # Of map-reduce, roughly.
                sections += math.ceil(prompt.tokens / answerer.limit)
                too_long.append(f"  {prompt.tokens:>10,}  {each.record.id}")
            elif len(prompts) < sample:
                prompts.append(prompt)
    counted = f"{tokens:,} prompt tokens (longest {longest:,})"
    if documents and not tokens:
        counted = f"{characters:,} characters of prompts (nobody here can count tokens; see --tokenizer)"
    output_tokens = documents * settings.sampling.max_tokens
    begin = f"{inputs.total_files:,} files, {documents:,} documents to answer, {counted}"
    lines = [f"{begin}, up to {output_tokens:,} output tokens", *progress.passed_over()]
    if too_long:
        would = {
            "error": "would be error rows (see --fit)",
            "truncate": "would be cut off",
            "map-reduce": f"would take {sections:,} sections or more",
        }[settings.fit.mode]
        lines.append(f"{len(too_long):,} do not fit in {answerer.limit:,} prompt tokens and {would}:")
        lines += too_long[:_IDS_SHOWN]
        if len(too_long) > _IDS_SHOWN:
            lines.append(f"  and {len(too_long) - _IDS_SHOWN:,} more")
    if errors:
        lines.append(f"{errors.total():,} cannot be read: {listed(errors)}")
    for line in lines:
        say(console, line)
    return prompts, characters
