"""The tables of docs/evidence.md, from the records of `evidence.py`."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev

from .evidence_cells import RULER, Evidence, name_of
from .evidence_plan import SEARCH, Setting, score
from .markdown import markdown
from .numbers_tables import numbers_tables

LENGTHS = (2048, 4096, 8192, 16384, 32768, 65536, 131072)
KINDS = {"novels": "novels", "numbers": "text full of numbers", "sentences": "repeated sentences"}
DEFAULT = "default"
# What every table shows; the others stand in the table of options.
MAIN = ("plain", "paper", DEFAULT)
# The same for the models that read bytes.
BYTES_METHODS = ("plain", "whole prompt", DEFAULT)
BYTES_LENGTHS = (2048, 8192)
# Lengths of the summary.
SUMMARY = (32768, 65536)
# Lengths at which options and rivals are compared.
OPTIONS = (16384, 32768)


def evidence_tables(folder: Path) -> dict[str, Callable[[], str]]:
    """Every table that the page may name.

    Args:
        folder: of the records.
    """
    evidence = Evidence(folder)
    known: dict[str, Callable[[], str]] = {
        "evidence-summary": lambda: _summary(evidence),
        "evidence-conditions": lambda: _conditions(evidence),
        "evidence-text": lambda: _by_length(evidence, lambda *cell: _number(evidence.loss(*cell), 3)),
        "evidence-text-all": lambda: _by_length(evidence, lambda *cell: _number(evidence.loss(*cell, "all_"), 3)),
        "evidence-ruler": lambda: _by_length(evidence, lambda *cell: _number(evidence.ruler(*cell), 2)),
        "evidence-ruler-tasks": lambda: _ruler_tasks(evidence),
        "evidence-options": lambda: _options(evidence),
        "evidence-theta": lambda: _theta(evidence),
        "evidence-sequences": lambda: _sequences(evidence),
        "evidence-receptive": lambda: _receptive(evidence),
        "evidence-bytes": lambda: _bytes(Evidence(folder / "bytes")),
    }
    for task in ("passkey", "needles"):
        for kind in KINDS:
            known[f"evidence-{task}-{kind}"] = _found(evidence, task, kind)
    return known | numbers_tables(evidence.variations)


def _summary(evidence: Evidence) -> str:
    tasks = {f"pass key, {kind}": _share(evidence, "passkey", text) for text, kind in KINDS.items()}
    tasks["needle, novels"] = _share(evidence, "needles", "novels")
    tasks["RULER, five tasks"] = lambda *where: _number(evidence.ruler(*where), 2)
    tasks["text, loss"] = lambda *where: _number(evidence.loss(*where), 3)
    rows = []
    for model in evidence.models:
        for task, cell in tasks.items():
            cells = [cell(model, method, length) for length in SUMMARY for method in MAIN]
            if all(cells[: len(MAIN)]):
                rows.append([name_of(model), task, *(cell or "–" for cell in cells)])
    columns = [f"{method}, {short(length)}" for length in SUMMARY for method in MAIN]
    return markdown(["model", "task", *columns], rows)


def _found(evidence: Evidence, task: str, kind: str) -> Callable[[], str]:
    return lambda: _by_length(evidence, _share(evidence, task, kind))


def _share(evidence: Evidence, task: str, kind: str) -> Callable[[str, str, int], str]:
    """Cells of a task in a kind of text: share of the numbers found by model, method and length."""

    def cell(model: str, method: str, length: int) -> str:
        share = evidence.share(model, method, task, kind, length)
        return _number(share[0] if share else None, 2)

    return cell


def _by_length(evidence: Evidence, cell: Callable[[str, str, int], str]) -> str:
    rows = []
    for model in evidence.models:
        for method in MAIN:
            cells = [cell(model, method, length) for length in LENGTHS]
            if any(cells):
                rows.append([f"{name_of(model)}, {_bold(method)}", *cells])
    return _without_empty_columns(["model, method", *map(short, LENGTHS)], rows)


def _ruler_tasks(evidence: Evidence) -> str:
    rows = []
    for model in evidence.models:
        for method in MAIN:
            for length in OPTIONS:
                cells = [_number(evidence.ruler(model, method, length, [task]), 2) for task in RULER]
                if any(cells):
                    rows.append([f"{name_of(model)}, {_bold(method)}", short(length), *cells])
    return markdown(["model, method", "tokens", *RULER], rows)


def _options(evidence: Evidence) -> str:
    rows = []
    for model in evidence.models:
        for method in evidence.methods:
            # These stand in the table of calibration sequences.
            if "seed" in method or method.startswith("C "):
                continue
            found = [_share(evidence, "passkey", kind) for kind in ("novels", "numbers")]
            cells = [cell(model, method, length) for cell in found for length in OPTIONS]
            cells += [_loss_gained(evidence, model, method, length) for length in OPTIONS]
            if any(cells):
                rows.append([name_of(model), f"{_bold(method)}{_setting(evidence, model, method)}", *cells])
    names = [f"{kind}, {short(length)}" for kind in ("novels", "numbers") for length in OPTIONS]
    return markdown(["model", "method", *names, *(f"text, {short(length)}" for length in OPTIONS)], rows)


def _loss_gained(evidence: Evidence, model: str, method: str, length: int) -> str:
    """Loss less that at the training length, where nothing is filtered, and the number of windows."""
    record = evidence.cells.get((model, method, "text", "", length))
    loss, at_first = evidence.loss(model, method, length), evidence.loss(model, method, LENGTHS[0])
    if record is None or loss is None or at_first is None:
        return ""
    return f"{loss - at_first:+.3f} ({sum(book['windows'] for book in record['books'].values()):g})"


def _setting(evidence: Evidence, model: str, method: str) -> str:
    """What a search found for a method, in words."""
    if not any(of == model and name.startswith(f"{SEARCH}{method}: ") for of, name in evidence.searched):
        return ""
    cells = (record["unit"] for record in evidence.cells.values())
    found = next(unit["setting"] for unit in cells if (unit["model"], unit["method"]) == (model, method))
    default = asdict(Setting())
    given = [f"{name} {value}" for name, value in found.items() if value not in (default[name], 1)]
    return f" ({', '.join(given)})" if given else ""


def _theta(evidence: Evidence) -> str:
    """What the searches saw: keys found, and nats a token, by table and theta."""
    figures: dict[tuple[str, float], dict[str, str]] = defaultdict(dict)
    tables = []
    for (model, method), records in sorted(evidence.searched.items()):
        setting = records[0]["unit"]["setting"]
        if not method.startswith(f"{SEARCH}paper: "):
            continue
        share, loss = score(records)
        tables.append(setting["table"])
        figures[model, setting["theta"]][setting["table"]] = f"{share:.2f}; {loss:.3f}"
    names = sorted(set(tables), key=lambda name: float(name[1:]))
    rows = [
        [name_of(model), f"{theta:g}", *(cells.get(name, "") for name in names)]
        for (model, theta), cells in sorted(figures.items())
    ]
    return markdown(["model", "theta", *(f"C {name[1:]} %: keys; text" for name in names)], rows)


def _sequences(evidence: Evidence) -> str:
    """Three groups of five calibration sequences: mean and standard deviation."""
    rows = []
    for model in evidence.models:
        for method in [name for name in evidence.methods if f"{name}, seed 1" in evidence.methods]:
            groups = [method, f"{method}, seed 1", f"{method}, seed 2"]
            cells = []
            for length in OPTIONS:
                shares = [evidence.share(model, group, "passkey", "novels", length) for group in groups]
                cells.append(_spread([share[0] for share in shares if share], len(groups), 2))
                losses = [evidence.loss(model, group, length) for group in groups]
                cells.append(_spread([loss for loss in losses if loss is not None], len(groups), 4))
            if any(cells):
                rows.append([name_of(model), _bold(method), *cells])
    names = [f"{what}, {short(length)}" for length in OPTIONS for what in ("keys", "text")]
    return _without_empty_columns(["model", "method", *names], rows)


def _without_empty_columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    kept = [column for column in range(len(head)) if any(row[column] for row in rows)]
    return markdown([head[column] for column in kept], [[row[column] for column in kept] for row in rows])


def _spread(figures: Sequence[float], groups: int, digits: int) -> str:
    return f"{mean(figures):.{digits}f} ± {stdev(figures):.{digits}f}" if len(figures) == groups else ""


def _receptive(evidence: Evidence) -> str:
    """How far back models look, and a picture of each."""
    rows, pictures = [], []
    for model, record in evidence.inspected.items():
        shares = [f"{record['global'][0]} of {record['global'][1]}", f"{next(iter(record['kept'].values())):.1%}"]
        distances = [f"{length:.0f}" for method in record["distance"].values() for length in method.values()]
        rows.append([name_of(model), *shares, *distances])
        pictures.append(f"![Receptive fields of {name_of(model)}](pictures/evidence-receptive-{model}.png)")
    head = ["model", "global channels", "kept, 16k"]
    head += ["distance: plain, 2k", "distance: plain, 16k", "distance: default, 16k"]
    return "\n\n".join([markdown(head, rows), *pictures])


def _bytes(evidence: Evidence) -> str:
    """The small models that read bytes."""
    rows = []
    for model in evidence.models:
        for method in BYTES_METHODS:
            found = [_share(evidence, task, "novels") for task in ("passkey", "needles")]
            cells = [cell(model, method, length) for cell in found for length in BYTES_LENGTHS]
            cells += [_number(evidence.loss(model, method, length), 3) for length in BYTES_LENGTHS]
            rows.append([f"{name_of(model)}, {_bold(method)}", *cells])
    names = [f"{what}, {length}" for what in ("pass key", "needle", "text") for length in BYTES_LENGTHS]
    return markdown(["model, method", *names], rows)


def _conditions(evidence: Evidence) -> str:
    def values(model: str, name: str) -> str:
        return ", ".join(
            sorted({str(engine.get(name, "")) for engine in evidence.engines[model] if not engine["decimamba"]})
        )

    names = ("hardware", "vllm", "dtype", "step_tokens")
    rows = [[name_of(model), *(values(model, name) for name in names)] for model in evidence.models]
    return markdown(["model", "hardware", "vLLM", "dtype", "tokens a step"], rows)


def short(length: int) -> str:
    """A length as a heading has it."""
    return f"{length // 1024}k"


def _bold(method: str) -> str:
    return f"**{method}**" if method == DEFAULT else method


def _number(figure: float | None, digits: int) -> str:
    return "" if figure is None else f"{figure:.{digits}f}"
