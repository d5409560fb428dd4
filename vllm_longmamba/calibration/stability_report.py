"""What `longmamba calibrate --groups` shows of several calibrations of one model."""

from pathlib import Path

import numpy as np
from rich.table import Table

from vllm_longmamba.tables import LayerStability

# Generous: where ten calibrations of the example model (with the plain mean) varied by 25 % in one layer, the share of
# keys that it found at 8 times its training length varied by 0.06.
MOST_RELATIVE_STD = 0.5
MOST_UNDECIDED = 0.25
UNSTABLE = (
    f"a threshold varies by more than {MOST_RELATIVE_STD:.0%} of its mean in the median, or more than "
    f"{MOST_UNDECIDED:.0%} of the global channels are local in another group"
)


def stability_table(layers: dict[int, LayerStability], groups: int) -> Table:
    """A table for the terminal: how far the groups agree, a row for each layer.

    Args:
        layers: from `table_stability`.
        groups: how many calibrations.
    """
    table = Table(
        title=f"{groups} calibrations on different text (± one standard deviation)",
        title_justify="left",
        caption="undecided: channels that are global in some groups only. "
        "threshold: standard deviation in per cent of the mean, of the channels that are global.",
        caption_justify="left",
    )
    columns = ("layer", "channels", "global", "undecided", "retention", "threshold: median", "95 %", "largest")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for index, layer in layers.items():
        table.add_row(str(index), *_row(layer))
    return table


def unstable_layers(layers: dict[int, LayerStability]) -> list[int]:
    """The layers whose thresholds, or whose set of global channels, depend on the sample of text (see `UNSTABLE`)."""
    found = []
    for index, layer in layers.items():
        used = int(layer.ever_global.sum())
        if used and (np.median(layer.relative_std) > MOST_RELATIVE_STD or layer.undecided > MOST_UNDECIDED * used):
            found.append(index)
    return found


def write_stability(layers: dict[int, LayerStability], row_lengths: np.ndarray, path: Path) -> None:
    """Write mean and standard deviation of every threshold and retention as a .npz file.

    Args:
        layers: from `table_stability`.
        row_lengths: (rows,) prompt lengths of the rows.
        path: the file to write.
    """
    arrays: dict[str, np.ndarray] = {"row_lengths": row_lengths}
    for index, layer in layers.items():
        for name in ("global_channels", "retention_mean", "retention_std", "threshold_mean", "threshold_std"):
            arrays[f"layers.{index}.{name}"] = getattr(layer, name)
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def _row(layer: LayerStability) -> list[str]:
    counts = layer.global_channels
    cells = [
        str(len(layer.ever_global)),
        f"{counts.mean():.1f} ± {counts.std(ddof=1):.1f}",
        str(layer.undecided),
    ]
    if not layer.ever_global.any():
        return [*cells, "-", "-", "-", "-"]
    median, high, largest = np.quantile(layer.relative_std, [0.5, 0.95, 1.0])
    retention_std = layer.retention_std[layer.ever_global].mean()
    return [*cells, f"± {retention_std:.4f}", f"{median:.1%}", f"{high:.1%}", f"{largest:.1%}"]
