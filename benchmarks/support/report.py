"""Markdown and a plot from the JSON of whole_models.py: python benchmarks/support/report.py FILE.json"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.environment import environment_line
from support.prefill_floors import floor_lines

# Tokens of the prompts whose kernels have tables.
KERNEL_LENGTHS = (8192, 65536)
PROFILED = (
    "GPU time of prefill: the time in which kernels run, overlaps once, in one run of each mode that is profiled and "
    "not timed. GPU time of a decode step: its CUDA graph, replayed one time after the other. Floors, of bytes and of "
    "arithmetic on an H200: support/prefill_floors.py."
)


def write_report(file: Path) -> None:
    """Write FILE.md, and FILE.png where matplotlib is installed."""
    document = json.loads(file.read_text())
    file.with_suffix(".md").write_text(markdown(document))
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    plot(document, file.with_suffix(".png"))


def markdown(document: dict[str, Any]) -> str:
    """Tables of all models."""
    settings = document["settings"]
    lines = [
        "# Whole models: stock vLLM against --model-impl longmamba",
        "",
        environment_line(document["environment"]),
        "",
        f"Dummy weights, bfloat16, published shapes; vLLM's defaults in both engines; SSM state "
        f"{settings.get('state_dtype', 'bfloat16')}; hybrids have "
        "a prefix cache, which no prompt hits. Medians; both engines took turns. "
        "`on`: 35 % of the channels are global and about half of their tokens are filtered (a table for dummy weights, "
        "support/shapes.py). `off`: the same engine, "
        "whose layers run the kernels without the filter.",
        *(["", settings["note"]] if "note" in settings else []),
    ]
    if any(has_gpu(result) for result in document["models"].values()):
        lines += ["", PROFILED]
    for name, result in document["models"].items():
        lines += ["", f"## {name}", ""]
        lines += prefill_lines(result)
        for length, figure in result.get("prefill", {}).items():
            if "kernels" in figure["on"]:
                stock, ours = figure["stock"]["kernels"], figure["on"]["kernels"]
                lines += kernel_lines(f"kernels of prefill {int(length):,}", stock, ours)
                lines += ["", *floor_lines(name, int(length), figure["on"], settings["tiny"])]
        lines += ["", *decode_lines(result.get("decode", {}))]
    return "\n".join(lines) + "\n"


def has_gpu(result: dict[str, Any]) -> bool:
    """Whether prefill of a model was profiled."""
    return any("gpu" in figure["on"] for figure in _prompts(result).values())


def _prompts(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    prefill = {f"prefill {int(length):,}": figure for length, figure in result.get("prefill", {}).items()}
    return prefill | ({"prefill 32 x 8,192": result["batch"]} if "batch" in result else {})


def prefill_lines(result: dict[str, Any]) -> list[str]:
    """A table of all prompts and of the batch: by the clock, and by the GPU where it was profiled."""
    prefill = _prompts(result)
    if not prefill:
        return []
    cells = " stock ms | on ms | x | off ms | x | on / off |"
    if has_gpu(result):
        head, columns = f"| | clock:{cells} GPU:{cells}", 13
    else:
        head, columns = f"| |{cells}", 7
    lines = [head, "|" + "---|" * columns]
    for what, figure in prefill.items():
        lines.append(f"| {what} |{_modes(figure, 'median', 1)}{_modes(figure, 'gpu', 2) if has_gpu(result) else ''}")
    if "peak_gib" in result:
        peak = result["peak_gib"]
        unused = " |" * (columns - 3)
        lines.append(f"| peak memory, 65,536 tokens, GiB | {peak['stock']:.2f} | {peak['on']:.2f} |{unused}")
    return lines


def _modes(figure: dict[str, Any], key: str, digits: int) -> str:
    """Six cells: a time of each mode in ms, and their ratios."""
    stock, on, off = (figure.get(mode, {}).get(key) for mode in ("stock", "on", "off"))
    if stock is None or on is None:
        return " |" * 6
    cells = f" {1e3 * stock:.{digits}f} | {1e3 * on:.{digits}f} | {stock / on:.2f} |"
    if off is None:
        return cells + " |" * 3
    return cells + f" {1e3 * off:.{digits}f} | {stock / off:.2f} | {100 * (on / off - 1):+.1f} % |"


def decode_lines(decode: dict[str, Any]) -> list[str]:
    """A table of the steps of all batches, and for each the kernels that take longest, of both engines."""
    if not decode:
        return []
    lines = ["| decode step, batch | clock: stock ms | ours ms | x | GPU: stock ms | ours ms | x |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for batch, figure in decode.items():
        line = f"| {batch} |"
        for what in ("clock", "gpu"):
            stock, ours = (1e3 * figure[mode][what] for mode in ("stock", "on"))
            line += f" {stock:.3f} | {ours:.3f} | {stock / ours if ours else float('nan'):.3f} |"
        lines.append(line)
    for batch, figure in decode.items():
        stock, ours = figure["stock"]["kernels"], figure["on"]["kernels"]
        lines += kernel_lines(f"kernels of a step, batch {batch}", stock, ours)
    return lines


def kernel_lines(title: str, stock: dict[str, Any], ours: dict[str, Any], most_kernels: int = 14) -> list[str]:
    """A table of the kernels that take longest in either engine, behind an empty line.

    Args:
        title: of the first column.
        stock: by name, microseconds and calls.
        ours: likewise.
        most_kernels: that are shown; the last row has all.
    """
    both = {name: (stock.get(name, (0.0, 0.0)), ours.get(name, (0.0, 0.0))) for name in {**stock, **ours}}
    ordered = sorted(both.items(), key=lambda item: -max(item[1][0][0], item[1][1][0]))
    lines = ["", f"| {title} | stock us | calls | ours us | calls |", "|---|---|---|---|---|"]
    for name, (first, second) in ordered[:most_kernels]:
        lines.append(f"| {name[:70]} | {first[0]:.1f} | {first[1]:.0f} | {second[0]:.1f} | {second[1]:.0f} |")
    totals = [sum(one[side][place] for one in both.values()) for side in (0, 1) for place in (0, 1)]
    lines.append("| all {} | {:.1f} | {:.0f} | {:.1f} | {:.0f} |".format(len(both), *totals))
    return lines


def plot(document: dict[str, Any], file: Path) -> None:
    """Speed-up over stock vLLM against the length of the prompt."""
    from matplotlib import pyplot

    if not any(result.get("prefill") for result in document["models"].values()):
        return
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name, result in document["models"].items():
        lengths = [int(length) for length in result.get("prefill", {})]
        if not lengths:
            continue
        speedups = [row["stock"]["median"] / row["on"]["median"] for row in result["prefill"].values()]
        axes.plot([length / 1024 for length in lengths], speedups, marker="o", label=name)
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.set(xlabel="prompt, thousand tokens", ylabel="stock time / LongMamba time, filter on", ylim=(0, None))
    axes.set_title(f"Prefill on one {document['environment']['device']}", fontsize=10)
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    write_report(Path(sys.argv[1]))
