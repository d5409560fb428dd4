"""Draws thresholds against the prompt's length, as the three methods of calibration make them.

    python benchmarks/closed_loop_pictures.py examples/reference-mamba1-4m examples/reference-mamba2-few-writes-4m \
        --output docs/pictures/thresholds.png

A model's folder holds paper.safetensors, longmamba.safetensors (unclamped) and closed-loop.safetensors. A column a
model: above, g(S) of its global channels, median and the middle 80 % of them, and single channels as dashed lines;
below, the ratio to the paper's table, channel by channel. Global is what the largest theta of the tables makes global.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image

from vllm_longmamba.evaluate.pictures import COLOURS
from vllm_longmamba.tables import ThresholdTable, load_table

FILES = {"paper": "paper", "unclamped": "longmamba", "closed loop": "closed-loop"}
SINGLE_CHANNELS = 3
COLOURS_OF_PNG = 128


def main() -> None:
    """Draw and say what was drawn."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", type=Path, nargs="+", help="folders with the three tables")
    parser.add_argument("--output", type=Path, default=Path("docs/pictures/thresholds.png"))
    options = parser.parse_args()
    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = len(options.models)
    figure, panels = pyplot.subplots(2, columns, figsize=(4.6 * columns + 0.6, 6.4), sharex="col", squeeze=False)
    for folder, (above, below) in zip(options.models, panels.T, strict=True):
        files = [folder / f"{name}.safetensors" for name in FILES.values()]
        lengths, values = global_thresholds([load_table(file) for file in files])
        _draw_thresholds(above, lengths, values)
        _draw_ratio(below, lengths, values)
        above.set_title(f"{folder.name}\n{values.shape[2]} global channels", fontsize=10)
        ratio = np.median(values[1, -1] / values[0, -1])
        print(f"{folder.name}: {values.shape[2]} channels; median of the ratio at {lengths[-1]}: {ratio:.2f}")
    panels[0, 0].set_ylabel("threshold g(S) of dt")
    panels[1, 0].set_ylabel("ratio to the paper's table")
    panels[0, 0].legend(loc="lower right", fontsize=8, frameon=False)
    figure.tight_layout()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.output, dpi=100)
    Image.open(options.output).convert("RGB").quantize(COLOURS_OF_PNG).save(options.output, optimize=True)
    print(f"written: {options.output}")


def global_thresholds(tables: Sequence[ThresholdTable]) -> tuple[np.ndarray, np.ndarray]:
    """The thresholds of the channels that are filtered by all tables in every row but the first.

    Args:
        tables: of one model and training length.

    Returns:
        (rows,) prompt lengths that all tables have, and (tables, rows, channels) thresholds.
    """
    theta = max(table.metadata.min_retention for table in tables)
    lengths = np.array(sorted(set.intersection(*(set(table.row_lengths[1:].tolist()) for table in tables))))
    values = []
    for table in tables:
        rows = np.searchsorted(table.row_lengths, lengths)
        layers = [table.thresholds(layer, theta).numpy()[rows] for layer in sorted(table.layers)]
        values.append(np.concatenate(layers, axis=1))
    both = np.stack(values)
    return lengths, both[:, :, (both > 0).all(axis=(0, 1))]


def _draw_thresholds(panel: Any, lengths: np.ndarray, values: np.ndarray) -> None:
    # Channels that lie evenly among all, by the paper's last threshold.
    order = np.argsort(values[0, -1])
    single = order[np.linspace(0, len(order) - 1, SINGLE_CHANNELS + 2).astype(int)[1:-1]]
    for name, table, colour in zip(FILES, values, COLOURS[1:], strict=False):
        low, middle, high = np.quantile(table, [0.1, 0.5, 0.9], axis=1)
        panel.fill_between(lengths, low, high, color=colour, alpha=0.2, linewidth=0)
        panel.plot(lengths, middle, color=colour, linewidth=2.4, label=f"{name}: median, 10 to 90 %")
        panel.plot(lengths, table[:, single], color=colour, linewidth=0.8, linestyle="--")
    _log_axes(panel, lengths)


def _draw_ratio(panel: Any, lengths: np.ndarray, values: np.ndarray) -> None:
    panel.axhline(1.0, color=COLOURS[1], linewidth=2.4)
    for table, colour in zip(values[1:], COLOURS[2:], strict=False):
        low, middle, high = np.quantile(table / values[0], [0.1, 0.5, 0.9], axis=1)
        panel.fill_between(lengths, low, high, color=colour, alpha=0.2, linewidth=0)
        panel.plot(lengths, middle, color=colour, linewidth=2.4)
    _log_axes(panel, lengths)
    panel.set_xlabel("S, tokens of the prompt")


def _log_axes(panel: Any, lengths: np.ndarray) -> None:
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    doubled = [1024 * 2**step for step in range(20) if 1024 * 2**step <= lengths[-1]]
    panel.set_xticks(doubled, [str(length) for length in doubled])
    panel.grid(alpha=0.3)


if __name__ == "__main__":
    main()
