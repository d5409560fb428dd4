"""What a job would do: documents, tokens, and what does not fit."""

import math
from collections import Counter
from contextlib import AsyncExitStack, closing

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


async def dry_run(settings: JobSettings, console: Console, starting: Starting) -> None:
    """Count everything, and say it; no engine is started, and nothing is written.

    Raises:
        ValueError: wrong settings.
        JobStoppedError: the server cannot be reached.
    """
    progress = Progress(console)
    lengths: list[int] = []
    characters = 0
    too_long: list[tuple[int, str]] = []
    errors: Counter[str] = Counter()
    async with AsyncExitStack() as stack:
        stack.callback(Watchdog().stop)
        again = {"overwrite": settings.overwrite, "retry_errors": settings.retry_errors}
        store = stack.enter_context(closing(Store(settings.output, None, **again)))
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
            lengths.append(prompt.tokens)
            characters += len(prompt.text)
            if not answerer.fits(prompt):
                too_long.append((prompt.tokens, each.record.id))
    documents, tokens, limit = len(lengths), sum(lengths), answerer.limit
    counted = f"{tokens:,} prompt tokens (longest {max(lengths, default=0):,})"
    if documents and not tokens:
        counted = f"{characters:,} characters of prompts (nobody here can count tokens; see --tokenizer)"
    begin = f"{inputs.total_files:,} files, {documents:,} documents to answer, {counted}"
    lines = [f"{begin}, up to {documents * settings.sampling.max_tokens:,} output tokens", *progress.passed_over()]
    if too_long and limit is not None:
        sections = sum(math.ceil(length / limit) for length, _ in too_long)
        would = {
            "error": "would be error rows (see --fit)",
            "truncate": "would be cut off",
            "map-reduce": f"would take {sections:,} sections or more",
        }[settings.fit.mode]
        lines.append(f"{len(too_long):,} do not fit in {limit:,} prompt tokens and {would}:")
        lines += [f"  {length:>10,}  {record_id}" for length, record_id in too_long[:_IDS_SHOWN]]
        if len(too_long) > _IDS_SHOWN:
            lines.append(f"  and {len(too_long) - _IDS_SHOWN:,} more")
    if errors:
        lines.append(f"{errors.total():,} cannot be read: {listed(errors)}")
    for line in lines:
        say(console, line)
