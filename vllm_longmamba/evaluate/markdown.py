"""Reports as Markdown."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vllm_longmamba.evaluate.engine import LABELS


def questions_markdown(report: Mapping[str, Any]) -> list[str]:
    """The paragraphs and tables of a passkey or needles run; the report is as written to JSON."""
    text = "Share of the numbers found, with 95 % confidence intervals (Wilson)."
    rows = sorted(report["by_length"], key=lambda row: int(row["length"]))
    shares = table(["prompt (tokens)", "questions", *labels(report)], share_lines(rows, "length", "questions"))
    return [text, shares]


def perplexity_markdown(report: Mapping[str, Any]) -> list[str]:
    """Those of a perplexity run."""
    first_label, *other_labels = labels(report)
    header = ["window (tokens)", "books", "windows"]
    for label in labels(report):
        header += [f"{label}: nats/token", "perplexity", "bits/byte"]
    header += [f"{label} − {first_label} (nats/token)" for label in other_labels]
    lines = []
    for length, (first, *others) in side_by_side(report["by_length"], "length").items():
        cells = [str(length), str(first["books"]), str(first["windows"])]
        for row in (first, *others):
            cells += [interval(row, "loss", ".3f"), f"{row['perplexity']:.2f}", f"{row['bits_per_byte']:.3f}"]
        lines.append([*cells, *(interval(row["difference"], "loss", "+.3f") for row in others)])
    text = (
        f"Loss of the last {report['settings']['scored_tokens']} tokens of each window. Intervals: 95 %, bootstrap "
        "over books (over windows where there is one book only); differences are taken window by window."
    )
    return [text, table(header, lines)]


def labels(report: Mapping[str, Any]) -> list[str]:
    """The methods' names as readers know them."""
    return [LABELS[method] for method in report["methods"]]


def side_by_side(rows: Iterable[Mapping[str, Any]], name: str) -> dict[Any, list[Mapping[str, Any]]]:
    """Values of a column -> the rows that have it: one a method, in the methods' order."""
    found: dict[Any, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(row[name], []).append(row)
    return found


def share_lines(rows: Iterable[Mapping[str, Any]], name: str, count: str, form: str = ".2f") -> list[list[str]]:
    """Lines of a table: a value of the column `name`, the first method's `count`, and the share of each method."""
    return [
        [str(value), str(found[0][count]), *(interval(row, "share", form) for row in found)]
        for value, found in side_by_side(rows, name).items()
    ]


def heading(title: str) -> str:
    """A title, which no name of a model in it changes."""
    return "# " + re.sub(r"([\\`*_\[\]<>|#~!])", r"\\\1", " ".join(title.split()))


def document(report: Mapping[str, Any], title: str, parts: Iterable[str], pictures: Iterable[str]) -> str:
    """A whole report.

    Args:
        report: as written to JSON; what was run, where and with what is at the end.
        title: of the document.
        parts: paragraphs and tables.
        pictures: file names of pictures beside it.
    """
    images = [f"![{name}]({name})" for name in pictures if name.endswith(".png")]
    conditions = {name: report[name] for name in ("model", "command", "hardware", "methods", "settings")}
    block = f"```json\n{json.dumps(conditions, indent=1, ensure_ascii=False)}\n```"
    return "\n\n".join([heading(title), *parts, *images, "## Conditions", block]) + "\n"


def interval(row: Mapping[str, Any], name: str, form: str = ".2f") -> str:
    """A value of a report's row with its "low" and "high"."""
    return f"{row[name]:{form}} ({row['low']:{form}} to {row['high']:{form}})"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], rule: str = "---:") -> str:
    """A Markdown table, all columns aligned as the rule says: by default to the right."""
    lines = [header, [rule] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
