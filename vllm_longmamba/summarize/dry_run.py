"""What a job would do: documents, tokens, and what does not fit."""

import asyncio
import math
from collections import Counter
from contextlib import AsyncExitStack, closing, nullcontext

from rich.console import Console
from rich.progress import track

from vllm_longmamba.summarize.answering import make_answerer
from vllm_longmamba.summarize.engine import tokenizer_and_length
from vllm_longmamba.summarize.inputs import Inputs
from vllm_longmamba.summarize.job import Starting, admitted_records, start_backend
from vllm_longmamba.summarize.progress import Progress, listed, say
from vllm_longmamba.summarize.records import RecordError
from vllm_longmamba.summarize.settings import JobSettings
from vllm_longmamba.summarize.store import Store
from vllm_longmamba.summarize.texts import TextExtractor
from vllm_longmamba.summarize.watchdog import Watchdog

_IDS_SHOWN = 10


def dry_run(settings: JobSettings, console: Console, starting: Starting = nullcontext) -> None:
    """Count everything, and say it; no engine is started, and nothing is written.

    Raises:
        ValueError: wrong settings.
        JobStoppedError: the server cannot be reached.
    """
    asyncio.run(_dry_run(settings, console, starting))


async def _dry_run(settings: JobSettings, console: Console, starting: Starting) -> None:
    progress = Progress(console)
    documents = tokens = characters = longest = sections = 0
    too_long: list[str] = []
    errors: Counter[str] = Counter()
    async with AsyncExitStack() as stack:
        stack.callback(Watchdog().stop)
        store = stack.enter_context(closing(Store(settings.output, overwrite=settings.overwrite)))
        inputs = Inputs(settings.inputs, exclude=store.files())
        if settings.base_url is not None:
            _, answerer = await start_backend(stack, settings, console, starting)
        else:
            with starting():
                answerer = make_answerer(settings, *tokenizer_and_length(settings.engine))
        extractor = TextExtractor(settings.encoding, settings.max_bytes, settings.timeout_s)
        stack.callback(extractor.close)
        admitted = admitted_records(settings, inputs, store, progress)
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
