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
        f"Dummy weights, bfloat16, published shapes; SSM state {settings['state_dtype']} in both engines, "
        f"max_num_batched_tokens {settings['max_num_batched_tokens']}, no prefix cache, CUDA graphs for decode. "
        "Medians; both engines took turns. `on`: 35 % of the channels are global and about half of their tokens are "
        "filtered (a table for dummy weights, support/shapes.py). `off`: the same engine, whose layers run the kernels "
        "without the filter.",
        *(["", settings["note"]] if "note" in settings else []),
    ]
    for name, result in document["models"].items():
        lines += ["", f"## {name}", ""]
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
        for batch, figure in result.get("decode", {}).items():
            stock, on = (figure[mode]["median"] for mode in ("stock", "on"))
            lines.append(
                f"| decode step, batch {batch} | {1e3 * stock:.3f} | {1e3 * on:.3f} | {stock / on:.3f} | | | |"
            )
        if "peak_gib" in result:
            peak = result["peak_gib"]
            lines.append(f"| peak memory, 65,536 tokens, GiB | {peak['stock']:.2f} | {peak['on']:.2f} | | | | |")
    return "\n".join(lines) + "\n"


def plot(document: dict[str, Any], file: Path) -> None:
    """Speed-up over stock vLLM against the length of the prompt."""
    from matplotlib import pyplot

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
