"""From records to a report: the numbers with their intervals, as plain values for a JSON file."""

import math
import os
import platform
import shlex
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vllm_longmamba.evaluate.methods import Contestant
from vllm_longmamba.evaluate.needles import Question
from vllm_longmamba.evaluate.perplexity import Loss, Window, bits_per_byte, nats_per_token
from vllm_longmamba.evaluate.statistics import bootstrap_interval, wilson_interval


def provenance(model: str, methods: Mapping[str, Contestant], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What was run, where: the head of every report.

    Args:
        model: as the user named it.
        methods: what was compared.
        settings: the task's settings.
    """
    return {
        "model": model,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "hardware": _hardware(),
        "methods": {name: dict(contestant.description) for name, contestant in methods.items()},
        "settings": dict(settings),
    }


def summarize_questions(answers: Mapping[str, Iterable[tuple[Question, Mapping[str, Any]]]]) -> dict[str, Any]:
    """Share of the numbers found, by length and by length and depth.

    Args:
        answers: method -> questions and what became of them.

    Returns:
        "by_length" and "by_depth", rows of method, length, (depth,) questions, share, low, high (95 %).
    """
    by_length: dict[tuple[str, int], list[float]] = defaultdict(list)
    by_depth: dict[tuple[str, int, float], list[float]] = defaultdict(list)
    for method, answered in answers.items():
        for question, result in answered:
            by_length[method, question.length].append(float(np.mean(result["found"])))
            for depth, found in zip(result["depths"], result["found"], strict=True):
                by_depth[method, question.length, depth].append(float(found))
    return {
        "by_length": [
            {"method": method, "length": length, **share_of(scores)} for (method, length), scores in by_length.items()
        ],
        "by_depth": [
            {"method": method, "length": length, "depth": depth, **share_of(scores)}
            for (method, length, depth), scores in by_depth.items()
        ],
    }


def summarize_perplexity(losses: Mapping[str, Iterable[tuple[Window, Loss]]]) -> dict[str, Any]:
    """Loss by length, and how far each method's lies from the first one's.

    Args:
        losses: method -> windows and their losses.

    Returns:
        "by_length", rows of method, length, books, windows, tokens, loss (nats per token), low, high (95 %),
        perplexity, bits_per_byte, and for all but the first method "difference" of the loss with low and high,
        from the same windows of both.
    """
    by_length: dict[tuple[str, int], list[tuple[Window, Loss]]] = defaultdict(list)
    for method, scored in losses.items():
        for window, loss in scored:
            by_length[method, window.length].append((window, loss))
    first = next(iter(losses))
    rows = []
    for (method, length), scored in by_length.items():
        row = {"method": method, "length": length, **loss_of(scored)}
        if method != first:
            row["difference"] = difference(scored, by_length[first, length])
        rows.append(row)
    return {"by_length": rows, "compared_with": first}


def share_of(scores: Sequence[float]) -> dict[str, Any]:
    """Mean of scores between 0 and 1: questions, share, low, high (95 %)."""
    share = float(np.mean(scores))
    low, high = wilson_interval(share, len(scores))
    return {"questions": len(scores), "share": share, "low": low, "high": high}


def loss_of(scored: Iterable[tuple[Window, Loss]]) -> dict[str, Any]:
    """Loss of windows together: books, windows, tokens, loss, low, high, perplexity, bits_per_byte."""
    clusters: dict[str, list[list[float]]] = defaultdict(list)
    for window, loss in scored:
        clusters[window.book].append([loss.nats, loss.tokens, loss.bytes])
    everything = np.array([sample for samples in clusters.values() for sample in samples])
    mean = nats_per_token(everything)
    low, high = bootstrap_interval(clusters, nats_per_token)
    return {
        "books": len(clusters),
        "windows": len(everything),
        "tokens": int(everything[:, 1].sum()),
        "loss": mean,
        "low": low,
        "high": high,
        "perplexity": math.exp(mean),
        "bits_per_byte": bits_per_byte(everything),
    }


def difference(scored: Iterable[tuple[Window, Loss]], others: Iterable[tuple[Window, Loss]]) -> dict[str, float]:
    """Loss less the loss of others on the same windows: loss, low, high (95 %), in nats per token."""
    of_others = dict(others)
    clusters: dict[str, list[list[float]]] = defaultdict(list)
    for window, loss in scored:
        clusters[window.book].append([loss.nats - of_others[window].nats, loss.tokens])
    everything = np.array([sample for samples in clusters.values() for sample in samples])
    low, high = bootstrap_interval(clusters, nats_per_token)
    return {"loss": nats_per_token(everything), "low": low, "high": high}


def _hardware() -> str:
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    threads = os.environ.get("VLLM_CPU_OMP_THREADS_BIND")
    bound = f", vLLM bound to {threads}" if threads else ""
    return f"CPU, {platform.machine()}, {os.cpu_count()} cores{bound}"
