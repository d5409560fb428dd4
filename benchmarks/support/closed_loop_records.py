"""The records of closed_loop_research.py: one JSON line a trial."""

import json
import lzma
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from vllm_longmamba.evaluate.statistics import wilson_interval


def read_records(file: Path) -> list[dict[str, Any]]:
    """The records of earlier runs; the file may be packed with xz."""
    content = file.read_bytes()
    text = lzma.decompress(content) if file.suffix == ".xz" else content
    return [json.loads(line) for line in text.splitlines()]


def report(lines: list[dict[str, Any]]) -> str:
    """Markdown: a row for each method and length."""
    cells: dict[tuple[int, str], list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        cells[line["length"], line["method"]].append(line)
    rows = [
        "| S | method | keys found | 95 % | mean log P(key) | bits/byte | last 2048 |",
        "|---|---|---|---|---|---|---|",
    ]
    for (length, method), trials in sorted(cells.items()):
        share = float(np.mean([trial["found"] for trial in trials]))
        low, high = wilson_interval(share, len(trials))
        means = [np.mean([trial[key] for trial in trials]) for key in ("logprob", "bits", "last_bits")]
        hits = sum(trial["found"] for trial in trials)
        rows.append(
            f"| {length} | {method} | {hits}/{len(trials)} | {low:.2f} to {high:.2f} | {means[0]:.2f} | {means[1]:.3f} "
            f"| {means[2]:.3f} |"
        )
    return "\n".join(rows)
