"""Fills the tables of README.md and pages in docs/, and draws their pictures, from the records in benchmarks/results.

    python benchmarks/results_page.py
    python benchmarks/results_page.py --add records.jsonl    # first takes new records of evidence.py

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; whatever was there is replaced. Pictures go to
docs/pictures. No figure of those tables is written by hand.
"""

import argparse
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from support.evidence_tables import evidence_tables
from support.markdown import markdown
from support.records import MODELS, of_models

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ("README.md", "docs/results.md", "docs/evidence.md", "docs/decimamba.md")
NOT_MEASURED = "–"
BLOCK = re.compile(r"(<!-- table: ([a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def tables(results: Path) -> dict[str, Callable[[], str]]:
    """Every table that a page may name.

    Args:
        results: folder of the records.
    """
    return {
        "generated": lambda: _generated(results),
        "prefill": lambda: _prefill(results),
        "decode": lambda: _decode(results),
        "decode-times": lambda: _decode_times(results),
        "decimamba-prefill": lambda: _decimamba_prefill(results),
        "agreement": lambda: _agreement(results),
        **evidence_tables(results / "evidence"),
    }


def add_records(file: Path, folder: Path) -> None:
    """Put the records of a run of evidence.py into those of each model; those of the same key are replaced.

    Args:
        file: records of any models, one a line.
        folder: of the records, one file a model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    of_models: dict[str, dict[str, str]] = {}
    for line in file.read_text().splitlines():
        record = json.loads(line)
        model = record["unit"]["model"] if "unit" in record else record["model"]
        of_models.setdefault(model, {})[record["key"]] = line
    for model, lines in of_models.items():
        known = folder / f"{model}.jsonl"
        before = known.read_text().splitlines() if known.exists() else []
        every = {json.loads(line)["key"]: line for line in before} | lines
        known.write_text("".join(f"{every[key]}\n" for key in sorted(every)))


def fill(page: str, results: Path) -> str:
    """A page with its tables written anew.

    Raises:
        ValueError: a table that is not known.
    """
    known = tables(results)

    def replace(block: re.Match[str]) -> str:
        if block[2] not in known:
            raise ValueError(f"no table is called {block[2]!r}; there are {', '.join(known)}")
        return f"{block[1]}\n{known[block[2]]()}\n\n{block[3]}"

    return BLOCK.sub(replace, page)


def _generated(results: Path) -> str:
    lengths, rows = (2048, 4096, 8192), []
    for model, record in of_models(results, "ablation-decode").items():
        keys, texts = _figures(record["passkey"], "share"), _figures(record["perplexity"], "loss")
        for method in ("plain", "not filtered", "filtered"):
            of_keys = [_figure(keys.get((method, length)), "share") for length in lengths]
            of_texts = [_figure(texts.get((method, length)), "loss") for length in lengths]
            rows.append([MODELS[model], method, *of_keys, *of_texts])
    head = ["model", "", *(f"keys, {length}" for length in lengths), *(f"text, {length}" for length in lengths)]
    return markdown(head, rows)


def _prefill(results: Path) -> str:
    columns = {
        "4096": "4k",
        "8192": "8k",
        "16384": "16k",
        "32768": "32k",
        "65536": "64k",
        "98304": "96k",
        "batch": "32 prompts of 8k",
    }
    rows = []
    for name, result in _whole_models(results):
        if prefill := result.get("prefill"):
            figures = [{**prefill, "batch": result.get("batch")}.get(column) for column in columns]
            rows.append([name, *(_speed_up(figure, "median") if figure else NOT_MEASURED for figure in figures)])
    return markdown(["speed-up", *columns.values()], rows)


def _whole_models(results: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    models: dict[str, dict[str, Any]] = json.loads((results / "whole_models.json").read_text())["models"]
    return models.items()


def _decode(results: Path) -> str:
    batches = ("1", "64", "256", "512")
    rows = []
    for name, result in _whole_models(results):
        if decode := result.get("decode"):
            figures = [decode.get(batch) for batch in batches]
            cells = (f"{_speed_up(of, 'gpu')} ({_speed_up(of, 'clock')})" if of else NOT_MEASURED for of in figures)
            rows.append([name, *cells])
    return markdown(["batch", *batches], rows)


def _decode_times(results: Path) -> str:
    rows = []
    for name, result in _whole_models(results):
        for batch, figure in result.get("decode", {}).items():
            stock, ours = figure["stock"], figure["on"]
            times = [f"{1e3 * stock['gpu']:.2f}", f"{1e3 * ours['gpu']:.2f}", _speed_up(figure, "gpu")]
            rows.append([name, batch, *times, _clocks(stock), _clocks(ours)])
    head = ["model", "batch", "GPU time: stock", "ours", "stock / ours", "by the clock: stock", "ours"]
    return markdown(head, rows)


def _clocks(run: Mapping[str, Any]) -> str:
    """The shortest and the longest of its runs."""
    return f"{1e3 * min(run['clocks']):.1f} to {1e3 * max(run['clocks']):.1f}"


def _speed_up(figure: Mapping[str, Any], time: str) -> str:
    """How many times as long stock vLLM takes, by one of its times."""
    return f"{figure['stock'][time] / figure['on'][time]:.2f}"


def _decimamba_prefill(results: Path) -> str:
    rows = []
    for name, lengths in json.loads((results / "decimamba_prefill.json").read_text())["models"].items():
        for length, found in lengths.items():
            stock, ours, decimated = (1e3 * found[way]["median"] for way in ("stock", "longmamba", "decimamba"))
            times = [f"{time:,.0f} ms" for time in (stock, ours, decimated)]
            rows.append([name, f"{int(length):,}", *times, f"{ours / decimated:.1f} x"])
    head = ["model", "tokens", "stock vLLM", "LongMamba", "DeciMamba", "LongMamba / DeciMamba"]
    return markdown(head, rows)


def _agreement(results: Path) -> str:
    rows = []
    for file in ("engine_vs_torch.json", "peer_mamba_ssm.json"):
        for model, pairs in json.loads((results / file).read_text())["models"].items():
            if model in MODELS:
                rows += [
                    [MODELS[model], pair, f"{gap['largest']:.1e}", f"{gap['mean']:.1e}"] for pair, gap in pairs.items()
                ]
    return markdown(["model", "compared", "largest difference", "mean"], rows)


def _figures(rows: Iterable[Mapping[str, Any]], value: str) -> dict[tuple[str, int], float]:
    """(method, length) -> figure."""
    return {(row["method"], row["length"]): row[value] for row in rows}


def _figure(figure: float | None, value: str) -> str:
    return "" if figure is None else f"{figure:.3f}" if value == "loss" else f"{figure:.2f}"


def main() -> None:
    """Fill the pages and draw the pictures."""
    from support.results_pictures import draw_pictures

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of README.md and docs/")
    parser.add_argument("--add", type=Path, nargs="*", default=[], help="records of evidence.py")
    options = parser.parse_args()
    for file in options.add:
        add_records(file, options.results / "evidence")
    for name in PAGES:
        page = options.root / name
        page.write_text(fill(page.read_text(), options.results))
    for picture in draw_pictures(options.results, options.root / "docs" / "pictures"):
        print(f"written: {picture}")


if __name__ == "__main__":
    main()
