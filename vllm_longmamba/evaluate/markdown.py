"""Reports as Markdown."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vllm_longmamba.evaluate.methods import LABELS

# Characters of digests of tables, texts and weights.
_DIGESTS = (32, 64)


def questions_markdown(report: Mapping[str, Any], title: str, pictures: Sequence[str]) -> str:
    """The report of a passkey or needles run.

    Args:
        report: as written to JSON.
        title: of the document.
        pictures: file names of pictures beside it.
    """
    methods = list(report["methods"])
    rows = _by_length(report["by_length"])
    shares = table(
        ["prompt (tokens)", "questions", *(LABELS[method] for method in methods)],
        ([str(length), str(next(iter(row.values()))["questions"]), *_shares(row, methods)] for length, row in rows),
    )
    text = "Share of the numbers found, with 95 % confidence intervals (Wilson)."
    return "\n\n".join([f"# {title}", text, shares, *images(pictures), conditions(report)]) + "\n"


def perplexity_markdown(report: Mapping[str, Any], pictures: Sequence[str]) -> str:
    """The report of a perplexity run; arguments as above."""
    methods = list(report["methods"])
    first = report["compared_with"]
    header = ["window (tokens)", "books", "windows"]
    for method in methods:
        header += [f"{LABELS[method]}: nats/token", "perplexity", "bits/byte"]
    header += [f"{LABELS[method]} − {LABELS[first]} (nats/token)" for method in methods if method != first]
    lines = []
    for length, row in _by_length(report["by_length"]):
        some = next(iter(row.values()))
        cells = [str(length), str(some["books"]), str(some["windows"])]
        for method in methods:
            cells += _losses(row[method]) if method in row else [""] * 3
        for method in methods:
            if method != first:
                cells.append(interval(row[method]["difference"], "loss", "+.3f") if method in row else "")
        lines.append(cells)
    text = (
        f"Loss of the last {report['settings']['scored_tokens']} tokens of each window. Intervals: 95 %, bootstrap "
        "over books (over windows where there is one book only); differences are taken window by window."
    )
    parts = ["# Perplexity", text, table(header, lines), *images(pictures), conditions(report)]
    return "\n\n".join(parts) + "\n"


def _losses(row: Mapping[str, Any]) -> list[str]:
    return [interval(row, "loss", ".3f"), f"{row['perplexity']:.2f}", f"{row['bits_per_byte']:.3f}"]


def _shares(row: Mapping[str, Mapping[str, Any]], methods: Iterable[str]) -> list[str]:
    return [interval(row[method], "share", ".2f") if method in row else "" for method in methods]


def interval(row: Mapping[str, Any], name: str, form: str) -> str:
    """A value of a report's row with its "low" and "high"."""
    return f"{row[name]:{form}} ({row['low']:{form}} to {row['high']:{form}})"


def _by_length(rows: Iterable[Mapping[str, Any]]) -> list[tuple[int, dict[str, Mapping[str, Any]]]]:
    lengths: dict[int, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        lengths.setdefault(row["length"], {})[row["method"]] = row
    return sorted(lengths.items())


def conditions(report: Mapping[str, Any]) -> str:
    """What was run, where and with what: the end of every report."""
    lines = ["## Conditions", ""]
    lines += [f"- Model: {report['model']}", f"- Command: `{report['command']}`", f"- Hardware: {report['hardware']}"]
    lines += [f"- {LABELS.get(name, name)}: {_values(values)}" for name, values in report["methods"].items()]
    lines.append(f"- Settings: {_values(report['settings'])}")
    return "\n".join(lines)


def _values(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_value(value)}" for name, value in values.items() if value is not None)


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} ({_value(part)})" for name, part in value.items())
    if isinstance(value, list):
        return ", ".join(map(_value, value))
    if isinstance(value, str) and len(value) in _DIGESTS:
        # The JSON file has all of it.
        return value[:12]
    # A sentence with its line breaks.
    return f"`{value!r}`" if isinstance(value, str) and "\n" in value else str(value)


def images(names: Iterable[str]) -> list[str]:
    """References to pictures beside the report."""
    return [f"![{name}]({name})" for name in names]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, all columns aligned to the right."""
    lines = [header, ["---:"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
