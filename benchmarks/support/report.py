"""Markdown and a plot from the JSON of whole_models.py: python benchmarks/support/report.py FILE.json"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.environment import environment_line


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
        f"{settings.get('state_dtype', 'bfloat16')}; no prefix cache. Medians; both engines took turns. "
        "`on`: 35 % of the channels are global and about half of their tokens are filtered (a table for dummy weights, "
        "support/shapes.py). `off`: the same engine, "
        "whose layers run the kernels without the filter.",
        *(["", settings["note"]] if "note" in settings else []),
    ]
    for name, result in document["models"].items():
        lines += ["", f"## {name}", ""]
        if "prefill" in result:
            lines += ["| | stock ms | on ms | x | off ms | x | on / off |", "|---|---|---|---|---|---|---|"]
        prefill = {f"prefill {int(length):,}": figure for length, figure in result.get("prefill", {}).items()}
        if "batch" in result:
            prefill["prefill 32 x 8,192"] = result["batch"]
        for what, figure in prefill.items():
            stock, on = (figure[mode]["median"] for mode in ("stock", "on"))
            row = f"| {what} | {1e3 * stock:.1f} | {1e3 * on:.1f} | {stock / on:.2f} |"
            if "off" in figure:
                off = figure["off"]["median"]
                row += f" {1e3 * off:.1f} | {stock / off:.2f} | {100 * (on / off - 1):+.1f} % |"
            else:
                row += " | | |"
            lines.append(row)
        if "peak_gib" in result:
            peak = result["peak_gib"]
            lines.append(f"| peak memory, 65,536 tokens, GiB | {peak['stock']:.2f} | {peak['on']:.2f} | | | | |")
        lines += ["", *decode_lines(result.get("decode", {}))]
    return "\n".join(lines) + "\n"


def decode_lines(decode: dict[str, Any], most_kernels: int = 14) -> list[str]:
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
        both = {name: (stock.get(name, (0.0, 0.0)), ours.get(name, (0.0, 0.0))) for name in {**stock, **ours}}
        ordered = sorted(both.items(), key=lambda item: -max(item[1][0][0], item[1][1][0]))
        lines += [
            "",
            f"| kernels of a step, batch {batch} | stock us | calls | ours us | calls |",
            "|---|---|---|---|---|",
        ]
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
