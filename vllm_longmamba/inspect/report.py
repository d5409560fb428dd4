"""`longmamba inspect` from what the user asked for to the terminal and the files."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from vllm_longmamba.inspect.channels import check_layers, choose_channels, choose_layers, parse_channel, parse_numbers
from vllm_longmamba.inspect.measure import Measurements, measure
from vllm_longmamba.inspect.pictures import retention_picture, save, threshold_picture
from vllm_longmamba.inspect.summary import default_lengths, fitting_lengths, layer_table, measured_table, provenance
from vllm_longmamba.tables import ThresholdTable, load_table


@dataclass(frozen=True)
class Request:
    """What the user asked for; the fields are the options of `longmamba inspect`."""

    model_or_table: str
    text: Path | None = None
    output: Path | None = None
    lengths: str | None = None
    layers: str | None = None
    channels: list[str] = field(default_factory=list)
    table: Path | None = None
    min_retention: float | None = None
    engine_args: dict[str, Any] = field(default_factory=dict)


def report(request: Request, console: Console, progress: Callable[[list[Any]], Iterable[Any]] = iter) -> list[Path]:
    """Print the tables, write the pictures.

    Args:
        request: what the user asked for.
        console: where the tables are printed.
        progress: wraps the iteration over the measured prompts, for a progress bar.

    Returns:
        The pictures' files.

    Raises:
        ValueError: no table, a wrong one, a text without a model, a layer or channel that is not there, no matplotlib.
    """
    path, is_model = _find(request)
    table = load_table(path)
    theta = request.min_retention
    lengths = parse_numbers(request.lengths, "--lengths") if request.lengths else None
    layers = check_layers(parse_numbers(request.layers, "--layers"), table) if request.layers else None
    curves = layers or choose_layers(table, theta)
    channels = [parse_channel(text, table) for text in request.channels] or choose_channels(table, curves, theta)
    pictures = {}
    if request.output is not None:
        pictures = {"retention": retention_picture(table, theta), "thresholds": threshold_picture(table, theta)}
    console.print(provenance(table, str(path), theta))
    side_by_side = fitting_lengths(console.width)
    shown = lengths or default_lengths(table, side_by_side)
    for start in range(0, len(shown), side_by_side):
        columns = shown[start : start + side_by_side]
        console.print(layer_table(table, columns, layers or sorted(table.layers), theta))
    if request.text is not None and is_model:
        measured = measure(
            request.model_or_table,
            table,
            path,
            request.text,
            lengths,
            channels,
            progress=progress,
            min_retention=theta,
            **request.engine_args,
        )
        console.print(measured_table(table, measured, theta))
        if request.output is not None:
            pictures |= _measured_pictures(table, measured, curves, theta)
    if request.output is None:
        return []
    request.output.mkdir(parents=True, exist_ok=True)
    return [file for name, figure in pictures.items() for file in save(figure, request.output, name)]


def _find(request: Request) -> tuple[Path, bool]:
    """The table's file, and whether the user named a model."""
    given = Path(request.model_or_table)
    if given.is_file() or given.suffix == ".safetensors":
        if request.text is not None or request.table is not None:
            raise ValueError(
                f"{given}: a table by itself has no Δt of a text, and --table needs a model; name the model "
                f"(`longmamba inspect MODEL --table {given} --text FILE`)"
            )
        return given, False
    from vllm_longmamba.checkpoint.shapes import open_model
    from vllm_longmamba.checkpoint.table_lookup import find_table
    from vllm_longmamba.options import LongMambaOptions

    options = LongMambaOptions(table=None if request.table is None else str(request.table))
    model = open_model(request.model_or_table)
    return find_table(request.model_or_table, model.weights, options), True


def _measured_pictures(
    table: ThresholdTable, measured: Measurements, layers: list[int], min_retention: float | None
) -> dict[str, Any]:
    from vllm_longmamba.inspect import measured_pictures

    return {
        "kept": measured_pictures.kept_picture(table, measured, min_retention),
        "receptive_fields": measured_pictures.receptive_field_picture(table, measured, min_retention),
        "decay": measured_pictures.decay_picture(table, measured, layers, min_retention),
        "mean_distance": measured_pictures.mean_distance_picture(measured),
    }
