"""Figures that a paper prints, to be laid beside one's own: JSON files, one model each.

    {"benchmark": "ruler", "model": "Zamba2-1.2B", "source": "where they are printed",
     "rows": [{"method": "plain", "length": 16384, "scores": {"S1": 30.0}, "average": 7.0}]}

Scores are percentages. "length" is of RULER only; "average" may be left out.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from vllm_longmamba.evaluate.harness.benchmarks import Benchmark

AVERAGE = "average"


@dataclass(frozen=True)
class PrintedFigures:
    """Printed figures of one model.

    Attributes:
        model: as the paper calls it.
        source: where they are printed.
        scores: (method, length or None) -> percentages by short name of the task, and of `AVERAGE`.
    """

    model: str
    source: str
    scores: Mapping[tuple[str, int | None], Mapping[str, float]]

    def methods(self) -> list[str]:
        """The methods, in the order they are printed in."""
        return list(dict.fromkeys(method for method, _ in self.scores))


def printed_figures(benchmark: Benchmark, model: str, file: Path | None) -> PrintedFigures | None:
    """The figures of a file, or those that come with the package for the model of that name, if there are any.

    Args:
        benchmark: what the figures are of.
        model: as the user named it; "Zyphra/Zamba2-1.2B" and a folder Zamba2-1.2B are the paper's Zamba2-1.2B.
        file: as above, whatever its model.

    Raises:
        ValueError: a file of another format, benchmark, or of unknown tasks.
    """
    if file is not None:
        return _read(benchmark, file.read_text(encoding="utf-8"), str(file))
    for entry in resources.files(__package__).joinpath("printed").iterdir():
        if entry.name.startswith(f"{benchmark.name}.") and entry.name.endswith(".json"):
            figures = _read(benchmark, entry.read_text(encoding="utf-8"), entry.name)
            if figures.model.lower() == Path(model).name.lower():
                return figures
    return None


def _read(benchmark: Benchmark, text: str, name: str) -> PrintedFigures:
    try:
        content = json.loads(text)
        scores = {(row["method"], row.get("length")): _scores(row) for row in content["rows"]}
        figures = PrintedFigures(str(content["model"]), str(content["source"]), scores)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{name}: no file of printed figures ({error!r}); see docs/lm_eval.md for the format"
        ) from error
    if content.get("benchmark") != benchmark.name:
        raise ValueError(f"{name}: its figures are of {content.get('benchmark')!r}, not of {benchmark.name!r}")
    named = {task for row in scores.values() for task in row} - {AVERAGE}
    if unknown := named - set(benchmark.tasks):
        raise ValueError(f"{name}: unknown tasks {', '.join(sorted(unknown))}; known are {', '.join(benchmark.tasks)}")
    return figures


def _scores(row: Mapping[str, Any]) -> dict[str, float]:
    scores = {str(task): float(score) for task, score in row["scores"].items()}
    return scores | ({AVERAGE: float(row["average"])} if "average" in row else {})
