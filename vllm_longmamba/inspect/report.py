"""`longmamba inspect` from what the user asked for to the terminal and the files."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from vllm_longmamba.inspect import pictures
from vllm_longmamba.inspect.channels import choose_channels, parse_channel
from vllm_longmamba.inspect.measure import measure
from vllm_longmamba.inspect.summary import default_lengths, layer_table, measured_table, provenance
from vllm_longmamba.tables import load_table


def report(
    model_or_table: str,
    console: Console,
    *,
    text: Path | None = None,
    output: Path | None = None,
    lengths: list[int] | None = None,
    channels: Sequence[str] = (),
    table_path: Path | None = None,
    min_retention: float | None = None,
    **measuring: Any,
) -> list[Path]:
    """Print the tables, write the pictures.

    Args:
        model_or_table: as the user gave it.
        console: where the tables are printed.
        text: with a model: what to run through it.
        output: folder of the pictures; None draws none.
        lengths: prompt lengths to show; by default some.
        channels: "LAYER:CHANNEL" whose receptive field is drawn; by default some.
        table_path: with a model: its table; by default the one that serving finds.
        min_retention: theta; by default the table's own.
        measuring: with a text: further arguments of `measure`.

    Returns:
        The pictures' files.

    Raises:
        ValueError: no table, a wrong one, a text without a model, a channel that is not there, no matplotlib.
    """
    path = Path(model_or_table)
    is_table = path.is_file() or path.suffix == ".safetensors"
    if is_table and (text is not None or table_path is not None):
        raise ValueError(
            f"{path}: a table by itself has no Δt of a text, and --table needs a model; name the model "
            f"(`longmamba inspect MODEL --table {path} --text FILE`)"
        )
    if not is_table:
        path = _table_of(model_or_table, table_path)
    table = load_table(path)
    own_theta = table.metadata.min_retention
    if min_retention is not None:
        table = replace(table, metadata=replace(table.metadata, min_retention=min_retention))
    chosen = [parse_channel(name, table) for name in channels] or choose_channels(table)
    figures = {}
    if output is not None:
        figures = {"retention": pictures.retention_picture(table), "thresholds": pictures.threshold_picture(table)}
    console.print(provenance(table, str(path), own_theta))
    console.print(layer_table(table, lengths or default_lengths(table)))
    if text is not None:
        measured = measure(model_or_table, table, path, text, lengths, chosen, **measuring)
        console.print(measured_table(table, measured))
        if output is not None:
            figures["kept"] = pictures.kept_picture(table, measured)
            figures["receptive_fields"] = pictures.receptive_field_picture(table, measured)
    if output is None:
        return []
    output.mkdir(parents=True, exist_ok=True)
    return [file for name, figure in figures.items() for file in pictures.save(figure, output, name)]


def _table_of(model: str, table_path: Path | None) -> Path:
    """The table of a model, whose weight files are those that vLLM finds (and for a model on the hub, downloads)."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins

    from vllm_longmamba.architectures import MODEL_IMPL
    from vllm_longmamba.checkpoint.table_lookup import find_table, locate_weights
    from vllm_longmamba.options import LongMambaOptions

    # Ours makes original checkpoints readable.
    load_general_plugins()
    arguments = EngineArgs(model=model, model_impl=MODEL_IMPL)
    weights = locate_weights(arguments.create_model_config(), arguments.create_load_config())
    return find_table(model, weights, LongMambaOptions(table=None if table_path is None else str(table_path)))
