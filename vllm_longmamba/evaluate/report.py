"""From records to a report: the numbers with their intervals, as plain values for a JSON file."""

import importlib.util
import json
import math
import os
import platform
import shlex
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vllm_longmamba.evaluate.comparison import Results
from vllm_longmamba.evaluate.engine import EngineContestant
from vllm_longmamba.evaluate.markdown import document, heading
from vllm_longmamba.evaluate.perplexity import Window
from vllm_longmamba.evaluate.statistics import ratio_interval, share_interval
from vllm_longmamba.evaluate.store import Store
from vllm_longmamba.evaluate.terminal import console

PICTURES = ("heat-map", "by-length", "perplexity", "tuning")
# All that a report may consist of.
FILES = ("report.json", "report.md", *(f"{name}.{kind}" for name in PICTURES for kind in ("png", "svg")))


def write_report(
    store: Store,
    report: Mapping[str, Any],
    title: str,
    describe: Callable[[Mapping[str, Any]], list[str]],
    draw: Callable[[Mapping[str, Any], str], Mapping[str, bytes]],
) -> None:
    """Write report.json, report.md and pictures, and show what the second says.

    Args:
        store: of the folder.
        report: as it goes into the JSON file.
        title: of text and pictures, before the model's name.
        describe: makes the paragraphs and tables of the report.
        draw: makes the pictures' files of report and title; they are left out where matplotlib is missing.

    Raises:
        ValueError: another file is in the way.
    """
    from rich.markdown import Markdown

    title = f"{title}: {Path(report['model']).name}"
    pictures: Mapping[str, bytes] = {}
    if importlib.util.find_spec("matplotlib") is not None:
        pictures = draw(report, title)
    else:
        console.print("no pictures: they need matplotlib (pip install 'vllm-longmamba[plot]')")
    parts = describe(report)
    text = document(report, title, parts, pictures)
    # Names of files may hold what is no UTF-8.
    described = text.encode(errors="backslashreplace")
    files = {"report.json": (json.dumps(report, indent=1) + "\n").encode(), "report.md": described, **pictures}
    store.write(files)
    console.print(Markdown("\n\n".join([heading(title), *parts])))
    console.print(f"written: {', '.join(str(store.folder / name) for name in files)}", soft_wrap=True)


def provenance(
    task: str, model: str, methods: Mapping[str, EngineContestant], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """What was run, where: the head of every report.

    Args:
        task: its name.
        model: as the user named it.
        methods: what was compared.
        settings: the task's settings.
    """
    return {
        "task": task,
        "model": model,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "hardware": _hardware(),
        "methods": {name: dict(contestant.description) for name, contestant in methods.items()},
        "settings": dict(settings),
    }


def rows(
    samples: Iterable[tuple[Mapping[str, Any], Any]], summarize: Callable[[list[Any]], Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """One row for all samples of the same place.

    Args:
        samples: place (such as method and length) and value.
        summarize: makes columns of the values of a place.

    Returns:
        Rows of the places and these columns, in the order of the samples.
    """
    values: dict[tuple[Any, ...], list[Any]] = defaultdict(list)
    for place, value in samples:
        values[tuple(place.items())].append(value)
    return [{**dict(place), **summarize(of_place)} for place, of_place in values.items()]


def summarize_questions(answers: Mapping[str, Results]) -> dict[str, Any]:
    """Share of the numbers found, by length and by length and depth.

    Args:
        answers: method -> questions and what became of them.

    Returns:
        "by_length" and "by_depth", rows of method, length, (depth,) questions, share, low, high (95 %).
    """
    found = [
        ({"method": method, "length": question.length}, question.depth, float(result["found"]))
        for method, answered in answers.items()
        for question, result in answered
    ]
    return {
        "by_length": rows([(place, score) for place, _, score in found], share_of),
        "by_depth": rows([({**place, "depth": depth}, score) for place, depth, score in found], share_of),
    }


def summarize_perplexity(losses: Mapping[str, Results]) -> dict[str, Any]:
    """Loss by length, and how far each method's lies from the first one's.

    Args:
        losses: method -> windows and their losses.

    Returns:
        "by_length", rows of method, length, books, windows, tokens, loss (nats per token), low, high (95 %),
        perplexity, bits_per_byte, and for all but the first method "difference" of the loss with low and high,
        from the same windows of both.
    """
    first = next(iter(losses))
    by_length = []
    for method, scored in losses.items():
        for length in dict.fromkeys(window.length for window, _ in scored):
            own = [(window, loss) for window, loss in scored if window.length == length]
            row = {"method": method, "length": length, **loss_of(own)}
            if method != first:
                row["difference"] = difference(own, losses[first])
            by_length.append(row)
    return {"by_length": by_length, "compared_with": first}


def share_of(scores: Sequence[float]) -> dict[str, Any]:
    """Mean of scores between 0 and 1: questions, share, low, high (95 %)."""
    low, high = share_interval(scores)
    return {"questions": len(scores), "share": float(np.mean(scores)), "low": low, "high": high}


def loss_of(scored: Results) -> dict[str, Any]:
    """Loss of windows together: books, windows, tokens, loss, low, high, perplexity, bits_per_byte."""
    mean = _mean([(window, loss["nats"], loss["tokens"]) for window, loss in scored])
    tokens, size = (sum(loss[name] for _, loss in scored) for name in ("tokens", "bytes"))
    return {
        "books": len({window.book for window, _ in scored}),
        "windows": len(scored),
        "tokens": tokens,
        **mean,
        "perplexity": math.exp(mean["loss"]),
        "bits_per_byte": mean["loss"] * tokens / size / math.log(2),
    }


def difference(scored: Results, others: Results) -> dict[str, float]:
    """Loss less the loss of others on the same windows: loss, low, high (95 %), in nats per token."""
    of_others = dict(others)
    return _mean([(window, loss["nats"] - of_others[window]["nats"], loss["tokens"]) for window, loss in scored])


def _mean(samples: Sequence[tuple[Window, float, int]]) -> dict[str, float]:
    """Nats per token of windows, their nats and tokens, with the interval over books."""
    books: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for window, nats, tokens in samples:
        books[window.book].append((nats, tokens))
    low, high = ratio_interval(books)
    return {
        "loss": sum(nats for _, nats, _ in samples) / sum(tokens for *_, tokens in samples),
        "low": low,
        "high": high,
    }


def _hardware() -> str:
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    threads = os.environ.get("VLLM_CPU_OMP_THREADS_BIND")
    bound = f", vLLM bound to {threads}" if threads else ""
    return f"CPU, {platform.machine()}, {os.cpu_count()} cores{bound}"
