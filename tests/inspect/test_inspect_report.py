"""`longmamba inspect` of a table by itself, and the pictures of measurements that are given."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_tables import write_small_table
from typer.testing import CliRunner

from vllm_longmamba.cli import app
from vllm_longmamba.inspect import pictures
from vllm_longmamba.inspect.measure import LayerMeasurement, Measurements, choose_lengths, measure
from vllm_longmamba.inspect.summary import default_lengths, kept_by_layer, measured_table
from vllm_longmamba.tables import LayerThresholds, TableMetadata, ThresholdTable

L = 8
# Two layers of four channels: two global ones in layer 0, none in layer 1.
RETENTIONS = ([1e-50, 1e-3, 0.1, 0.5], [0.0, 1e-30, 1e-20, 1e-10])


@pytest.fixture
def table() -> ThresholdTable:
    thresholds = torch.tensor([-1.0, 0.1, 0.2, 0.4])[:, None] * torch.tensor([1.0, 2.0, 3.0, 4.0])
    thresholds[0] = -1.0
    metadata = TableMetadata(
        model_id="org/model", weights_fingerprint="f" * 64, train_length=L, corpus="a [bold] book", clamp_percent=5.0,
        min_retention=1e-2, num_sequences=5, seed=0, tool_version="test",
    )  # fmt: skip
    layers = {
        layer: LayerThresholds(torch.tensor(retention, dtype=torch.float64), thresholds)
        for layer, retention in enumerate(RETENTIONS)
    }
    return ThresholdTable(metadata, np.array([8, 16, 32, 64]), layers)


def measurement(length: int, kept: float) -> dict[int, LayerMeasurement]:
    pixels = np.where(np.tri(4, dtype=bool), 10.0 ** -np.arange(4.0)[:, None], np.nan)
    return {
        layer: LayerMeasurement(
            kept=np.array([1.0, 1.0, kept, kept / 2]),
            distance=1.5 * length * (layer + 1),
            maps={2: pixels, 0: pixels},
        )
        for layer in (0, 1)
    }


@pytest.fixture
def measured() -> Measurements:
    plain = {length: measurement(length, 1.0) for length in (8, 16, 32)}
    filtered = {16: measurement(16, 0.4), 32: measurement(32, 0.2)}
    return Measurements("a book", [(0, 2), (0, 0)], plain, filtered)


def with_theta(table: ThresholdTable, theta: float) -> ThresholdTable:
    return replace(table, metadata=replace(table.metadata, min_retention=theta))


def inspect(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["inspect", *map(str, arguments)], env={"COLUMNS": "120"})
    return result.exit_code, result.output


def test_table_in_the_terminal(tmp_path: Path) -> None:
    write_small_table(tmp_path / "table.safetensors", corpus="a [bold] book", layers=(0, 2), channels=3)
    code, output = inspect(tmp_path / "table.safetensors", "--lengths", "9,13,20")
    assert code == 0
    lines = [" ".join(line.split()) for line in output.splitlines()]
    assert "model org/model" in lines
    assert "training length 8 tokens" in lines
    assert "rows 3, for prompts of 12 to 20 tokens" in lines
    assert "calibrated on 5 sequences, seed 0: a [bold] book" in lines
    assert not any(line.startswith(("budget", "unfiltered end")) for line in lines)
    # Retentions 1e-6, 1e-3 and 1, theta 1e-2: one global channel, of thresholds 0.1, 0.2, 0.3 in rows 1, 2, 3.
    assert "layer global channels S = 9 (row 8) S = 13 (row 12) S = 20" in lines
    assert "0 1/3 33% no filter 0.1 0.3" in lines
    assert "all 2/6 33%" in lines

    _, output = inspect(tmp_path / "table.safetensors", "--min-retention", "1e-5", "--lengths", "20")
    lines = [" ".join(line.split()) for line in output.splitlines()]
    assert "min_retention 1e-05 (the table's own: 0.01)" in lines
    assert "2 2/3 67% 0.3" in lines
    assert "all 4/6 67%" in lines


def test_budget_and_unfiltered_end_in_the_terminal(tmp_path: Path) -> None:
    unclamped = {"method": "unclamped", "clamp_percent": 0.0}
    table = write_small_table(tmp_path / "table.safetensors", **unclamped, budget=0.25, unfiltered_end=64)
    code, output = inspect(tmp_path / "table.safetensors")
    assert code == 0
    lines = [" ".join(line.split()) for line in output.splitlines()]
    assert {"budget 0.25", "unfiltered end 64 tokens", f"digest {table.digest()}"} <= set(lines)


def test_pictures_of_a_table(tmp_path: Path) -> None:
    write_small_table(tmp_path / "table.safetensors")
    names = [f"{name}.{suffix}" for name in ("retention", "thresholds") for suffix in ("png", "svg")]
    for folder in ("first", "second"):
        code, output = inspect(tmp_path / "table.safetensors", "--output", tmp_path / folder)
        assert code == 0
        assert [line.rpartition("/")[2] for line in output.splitlines() if line.startswith("wrote ")] == names
    assert sorted(path.name for path in (tmp_path / "first").iterdir()) == sorted(names)
    for name in names:
        content = (tmp_path / "first" / name).read_bytes()
        assert content.startswith(b"\x89PNG" if name.endswith("png") else b"<?xml")
        assert content == (tmp_path / "second" / name).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone.safetensors"], "there is no such file"),
        (["TABLE", "--text", "TABLE"], "a table by itself has no Δt of a text"),
        (["TABLE", "--table", "TABLE"], "--table needs a model"),
        (["TABLE", "--channel", "7:0"], "the table has no layer 7; it has [0, 1]"),
        (
            ["TABLE", "--lengths", "4k"],
            "--lengths: expected whole numbers separated by commas",
        ),
        (["TABLE", "--output", "TABLE"], "Invalid value for '--output'"),
        (["TABLE", "--lengths", "512,0"], "--lengths: every length must be 1 token or more, got 512,0"),
        (["TABLE", "--lengths", ""], "--lengths: expected whole numbers separated by commas"),
        (["TABLE", "--channel", "0:9"], "layer 0 has the channels 0 to 2"),
    ],
)
def test_refusals(arguments: list[str], message: str, tmp_path: Path) -> None:
    write_small_table(tmp_path / "table.safetensors")
    code, output = inspect(*[str(tmp_path / "table.safetensors") if word == "TABLE" else word for word in arguments])
    assert code != 0
    assert message in " ".join(output.replace("│", " ").split())


def test_a_folder_that_is_no_model_is_refused_in_one_line(tmp_path: Path) -> None:
    code, output = inspect(tmp_path)
    assert code == 1
    (line,) = [line for line in output.splitlines() if line.startswith("longmamba inspect: ")]
    assert "config.json" in line
    assert "pydantic" not in output


def test_a_text_that_is_no_utf8_is_refused_before_the_engine_starts(
    table: ThresholdTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "latin-1.txt"
    path.write_bytes(b"caf\xe9")
    monkeypatch.setattr("vllm.LLM", None)
    with pytest.raises(ValueError, match=r"latin-1\.txt: texts must be UTF-8, but .*; convert the file"):
        measure("model", table, tmp_path, path, None, [])


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_small_table(tmp_path / "table.safetensors")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, output = inspect(tmp_path / "table.safetensors", "--output", tmp_path / "pictures")
    assert code == 1
    assert "pip install 'vllm-longmamba[plot]'" in output
    assert not (tmp_path / "pictures").exists()
    assert inspect(tmp_path / "table.safetensors")[0] == 0


def test_lengths_that_are_shown(table: ThresholdTable) -> None:
    assert default_lengths(table) == [16, 32, 64]
    short = replace(table, row_lengths=np.array([8, 9, 10, 15]))
    assert default_lengths(short) == [15]


def test_lengths_that_are_measured() -> None:
    assert choose_lengths(None, 8, 1000) == [8, 16, 32, 64]
    assert choose_lengths(None, 8, 40) == [8, 16, 32]
    assert choose_lengths([20, 5, 20], 8, 20) == [5, 20]
    with pytest.raises(ValueError, match="has 19 tokens, but prompts of 20 are to be measured"):
        choose_lengths([5, 20], 8, 19)
    with pytest.raises(ValueError, match="has 7 tokens, but prompts of 8"):
        choose_lengths(None, 8, 7)


def test_kept_by_layer(table: ThresholdTable, measured: Measurements) -> None:
    # Only channels 2 and 3 of layer 0 are global.
    assert kept_by_layer(table, measured, 16) == {0: pytest.approx(0.3)}
    assert kept_by_layer(table, measured, 8) == {0: pytest.approx(0.75)}
    assert kept_by_layer(with_theta(table, 1e-15), measured, 16) == {0: pytest.approx(1.6 / 3), 1: pytest.approx(0.2)}


def test_measured_table(table: ThresholdTable, measured: Measurements) -> None:
    from rich.console import Console

    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(measured_table(table, measured))
    lines = [" ".join(line.split()) for line in console.export_text().splitlines()]
    assert "8 all 18" in lines
    assert "16 30.0% 36 36" in lines


def texts(figure: Any) -> list[str]:
    from matplotlib.text import Text

    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def test_retention_picture(table: ThresholdTable) -> None:
    figure = pictures.retention_picture(table)
    mesh = figure.axes[0].collections[0].get_array()
    # Bins of one power of ten; what is below 1e-40 stands at the left end.
    assert mesh.shape == (2, 40)
    assert [mesh[0, column] for column in (0, 37, 39)] == [25, 25, 50]
    assert [mesh[1, column] for column in (0, 10, 20, 30)] == [25] * 4
    assert "Retention of the channels of org/model (red: θ = 0.01)" in texts(figure)
    assert "Retention of the channels of org/model (red: θ = 0.5)" in texts(
        pictures.retention_picture(with_theta(table, 0.5))
    )


def test_threshold_picture(table: ThresholdTable) -> None:
    (axes, _) = pictures.threshold_picture(table).axes
    line, training = axes.lines
    assert line.get_xdata().tolist() == [16, 32, 64]
    np.testing.assert_allclose(line.get_ydata(), [0.35, 0.7, 1.4], rtol=1e-6)
    assert training.get_xdata() == [L, L]


def test_kept_picture(table: ThresholdTable, measured: Measurements) -> None:
    axes = pictures.kept_picture(table, measured).axes[0]
    layer, reference = axes.lines
    np.testing.assert_allclose(layer.get_ydata(), [75, 30, 15])
    np.testing.assert_allclose(reference.get_ydata(), [100, 50, 25])


def test_receptive_field_picture(table: ThresholdTable, measured: Measurements) -> None:
    figure = pictures.receptive_field_picture(table, measured)
    images = [axes.images[0] for axes in figure.axes if axes.images]
    assert len(images) == 6
    assert images[0].get_array()[3, 0] == -3
    assert images[0].get_array().mask[0, 1]
    titles = texts(figure)
    for title in ("S = 8\nlayer 0, channel 2 (global)", "S = 32, filtered\nlayer 0, channel 0 (local)"):
        assert title in titles


def test_pictures_of_short_prompts_only(table: ThresholdTable) -> None:
    measured = Measurements("a book", [(0, 2)], {8: measurement(8, 1.0)}, {})
    # No layer has a global channel: only the line for comparison.
    assert len(pictures.kept_picture(with_theta(table, 0.9), measured).axes[0].lines) == 1
    figure = pictures.receptive_field_picture(table, measured)
    assert len([axes for axes in figure.axes if axes.images]) == 1
