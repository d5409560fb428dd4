"""Joins reports of the same questions with different tables into one, so that all stand side by side.

    python benchmarks/join_reports.py out/passkey=paper "out/passkey-end=unfiltered end" \
        -o benchmarks/results/reference-mamba1-4m/passkey
    python benchmarks/join_reports.py benchmarks/results/reference-mamba1-4m/passkey --beside out/decimamba/passkey \
        -o benchmarks/results/reference-mamba1-4m/passkey

Each FOLDER=NAME holds the report.json of `longmamba eval passkey|needles|perplexity --method plain,longmamba`; NAME is
what tells its LongMamba from the others'. Settings, weights and the figures of the plain model must be the same in all.
A single FOLDER without a name is a report that was joined before. --beside adds the methods of a report of the same
questions, weights and hardware, such as `--method plain,decimamba`, under their own names; its plain model must be that
of the others. It may have fewer lengths.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PLAIN, LONGMAMBA = "plain", "longmamba"
# Lists of figures of a report, each with its method.
FIGURES = ("by_length", "by_depth")
# The plain model is run for each report; floating-point sums of a GPU may differ in their last digits.
TOLERANCE = 1e-3


def join(reports: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """One report of the plain model and each report's LongMamba.

    Args:
        reports: what tells each LongMamba from the others, and the report.

    Raises:
        ValueError: reports of different questions, weights or answers of the plain model.
    """
    first_name, first = reports[0]
    joined: dict[str, Any] = dict(first)
    joined["command"] = " ; ".join(report["command"] for _, report in reports)
    joined["methods"] = {PLAIN: first["methods"][PLAIN]}
    figures = [key for key in FIGURES if key in first]
    for key in figures:
        joined[key] = _of_method(first, key, PLAIN)
    for name, report in reports:
        for part in ("task", "settings", "hardware"):
            if report[part] != first[part]:
                raise ValueError(f"{name}: {part} is not that of {first_name}: {report[part]} and {first[part]}")
        if report["methods"][PLAIN] != first["methods"][PLAIN]:
            raise ValueError(f"{name}: the plain model is not that of {first_name}")
        for key in figures:
            _check_plain(_of_method(report, key, PLAIN), _of_method(first, key, PLAIN), f"{name}, {key}")
        label = f"LongMamba, {name}"
        joined["methods"][label] = report["methods"][LONGMAMBA]
        for key in figures:
            joined[key] = joined[key] + [row | {"method": label} for row in _of_method(report, key, LONGMAMBA)]
    return joined


def put_beside(joined: Mapping[str, Any], place: str, report: Mapping[str, Any]) -> dict[str, Any]:
    """A joined report with the methods of another one.

    Args:
        joined: with the plain model among its methods.
        place: of the other, for messages.
        report: the other.

    Raises:
        ValueError: other questions, weights or hardware, a method of a name that is there, or another plain model.
    """
    for part in ("task", "settings", "hardware"):
        if report[part] != joined[part]:
            raise ValueError(f"{place}: {part} is not that of the others: {report[part]} and {joined[part]}")
    weights = joined["methods"][PLAIN]["weights"]
    result = dict(joined) | {
        "methods": dict(joined["methods"]),
        "command": f"{joined['command']} ; {report['command']}",
    }
    for method, description in report["methods"].items():
        if description["weights"] != weights:
            raise ValueError(f"{place}: {method} has the weights {description['weights']}, the others {weights}")
        if method == PLAIN:
            _check_plain(_of_method(report, "by_length", PLAIN), _of_method(joined, "by_length", PLAIN), place)
            continue
        if method in joined["methods"]:
            raise ValueError(f"{place}: there is a method {method} already")
        result["methods"][method] = description
        for key in FIGURES:
            if key in joined:
                result[key] = result[key] + _of_method(report, key, method)
    return result


def _of_method(report: Mapping[str, Any], key: str, method: str) -> list[dict[str, Any]]:
    return [row for row in report[key] if row["method"] == method]


def _check_plain(rows: list[dict[str, Any]], expected: list[dict[str, Any]], place: str) -> None:
    before = {(row["length"], row.get("depth")): row for row in expected}
    for row in rows:
        value = "share" if "share" in row else "loss"
        other = before.get((row["length"], row.get("depth")), {}).get(value)
        if other is None or abs(row[value] - other) > TOLERANCE:
            raise ValueError(f"{place}: the plain model has {row[value]} at {row['length']}, and {other} before")


def _read(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return report


def main() -> None:
    """Write the joined report.json; results_page.py does the rest."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("reports", nargs="+", metavar="FOLDER=NAME", help="or a single FOLDER")
    parser.add_argument("--beside", action="append", type=Path, default=[], metavar="FOLDER")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the joined report.json")
    options = parser.parse_args()
    reports = []
    for given in options.reports:
        folder, _, name = given.partition("=")
        reports.append((name or Path(folder).name, _read(Path(folder))))
    try:
        joined = dict(reports[0][1]) if len(reports) == 1 else join(reports)
        for folder in options.beside:
            joined = put_beside(joined, str(folder), _read(folder))
    except ValueError as error:
        sys.exit(f"join_reports: {error}")
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "report.json").write_text(json.dumps(joined) + "\n")


if __name__ == "__main__":
    main()
