"""The `longmamba calibrate` command without an engine: what it passes on, writes and prints."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_tables import small_table
from typer.testing import CliRunner

import vllm_longmamba.calibration.offline as offline
from vllm_longmamba.calibration.settings import CalibrationSettings
from vllm_longmamba.calibration.stability_report import stability_table, unstable_layers, write_stability
from vllm_longmamba.cli import app
from vllm_longmamba.tables import LayerThresholds, ThresholdTable, load_table, table_stability

Run = Callable[..., Any]


def varied(seed: int, spread: float) -> ThresholdTable:
    """A small table whose thresholds differ from one seed to the next."""
    table = small_table()
    factor = 1 + spread * np.random.default_rng(seed).uniform(-1, 1)
    layers = {}
    for index, layer in table.layers.items():
        thresholds = layer.dt_threshold * factor
        thresholds[0] = -1.0
        layers[index] = LayerThresholds(layer.retention, thresholds)
    return ThresholdTable(metadata=replace(table.metadata, seed=seed), row_lengths=table.row_lengths, layers=layers)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Function: arguments -> (exit code, output, the arguments of `calibrate_all`)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # Wide enough for paths.
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: str, spread: float = 0.01) -> tuple[int, str, dict[str, Any]]:
        seen: dict[str, Any] = {}

        def calibrate_all(model: str, settings: list[CalibrationSettings], **kwargs: Any) -> list[ThresholdTable]:
            seen.update(kwargs, model=model, settings=settings)
            return [varied(each.seed, spread) for each in settings]

        monkeypatch.setattr(offline, "calibrate_all", calibrate_all)
        result = CliRunner().invoke(app, ["calibrate", *arguments])
        return result.exit_code, result.output, seen

    return call


def test_calibrate_by_default(run: Run, tmp_path: Path) -> None:
    code, output, seen = run("org/model")
    assert code == 0, output
    path = tmp_path / "cache" / "vllm_longmamba" / f"{'f' * 32}.safetensors"
    assert load_table(path).digest() == varied(0, 0.01).digest()
    assert f"wrote {path}: 2 layers, 2 of 6 channels global, rows up to 20 tokens" in output
    assert path.parent.stat().st_mode & 0o077 == 0
    assert seen == {
        "model": "org/model",
        "settings": [CalibrationSettings()],
        "model_impl": "longmamba",
        "dtype": "auto",
        "tensor_parallel_size": 1,
        "additional_config": {},
    }


@pytest.mark.parametrize("command", ["calibrate", "inspect"])
def test_help_shows_the_defaults(command: str) -> None:
    """Square brackets are markup to typer, which drops them."""
    result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"})
    expected = {
        "calibrate": "(default: unclamped; with --clamp-percent: paper)",
        "inspect": "(default: training lengths x 2^n)",
    }
    assert expected[command] in " ".join(result.output.replace("│", " ").split())


def test_calibrate_passes_its_options_on(run: Run, tmp_path: Path) -> None:
    text = tmp_path / "a.jsonl"
    text.write_text('{"body": "x"}')
    output = tmp_path / "new" / "table.safetensors"
    options = f"--text {text} --text {text} --text-column body --sequences 7 --clamp-percent 3 --min-retention 1e-5"
    options += " --train-length 64 --max-length 900 --seed 4 --dtype float32 --quantization fp8 --tokenizer t --tp 2"
    options += ' --unfiltered-end 128 --engine-args {"max_num_batched_tokens":99}'
    code, printed, seen = run("m", *options.split(), "-o", str(output))
    assert code == 0, printed
    assert load_table(output).metadata.train_length == 8
    (settings,) = seen["settings"]
    assert settings == CalibrationSettings(
        num_sequences=7,
        clamp_percent=3.0,
        min_retention=1e-5,
        train_length=64,
        max_length=900,
        seed=4,
        unfiltered_end=128,
        texts=(str(text), str(text)),
        text_column="body",
    )
    assert (seen["dtype"], seen["quantization"], seen["max_num_batched_tokens"]) == ("float32", "fp8", 99)
    assert (seen["tokenizer"], seen["tensor_parallel_size"]) == ("t", 2)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--budget 0.5 --unfiltered-end 64", CalibrationSettings(budget=0.5, unfiltered_end=64)),
        ("--channel-budget 0.1=2 --channel-budget 1.0=3", CalibrationSettings(channel_budgets=("0.1=2", "1.0=3"))),
        (
            "--method closed-loop --combine min --measure-to 300 --budget 0.5",
            CalibrationSettings(method="closed-loop", combine="min", measure_to=300, budget=0.5),
        ),
    ],
)
def test_calibrate_by_a_method(options: str, expected: CalibrationSettings, run: Run) -> None:
    code, printed, seen = run("m", *options.split())
    assert code == 0, printed
    assert seen["settings"] == [expected]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ("--method paper --budget 2", 1, "the method paper has no budget but that of the training length, got 2.0"),
        ("--clamp-percent 5 --budget 0.5", 1, "the method paper has no budget but that of the training length"),
        ("--budget 0", 1, "budget must be a factor above 0, got 0.0"),
        ("--method open", 1, "method must be one of unclamped, paper, closed-loop, got 'open'"),
        (
            '--engine-args {"max_model_len":5}',
            1,
            "--engine-args: max_model_len is set by --max-model-len; leave it out",
        ),
        ("--budget nan", 1, "budget must be a factor above 0, got nan"),
        ("--unfiltered-end -1", 2, "Invalid value for '--unfiltered-end'"),
        ("--unfiltered-end 0.5", 2, "Invalid value for '--unfiltered-end'"),
    ],
)
def test_calibrate_refuses_a_budget_or_an_end(options: str, code: int, message: str, run: Run) -> None:
    found, printed, seen = run("m", *options.split())
    assert (found, seen) == (code, {})
    assert message in " ".join(printed.split())


def test_calibrate_keeps_the_table_of_a_quantized_model_apart(run: Run, tmp_path: Path) -> None:
    assert run("m", "--quantization", "fp8")[0] == 0
    assert (tmp_path / "cache" / "vllm_longmamba" / f"{'f' * 32}-fp8.safetensors").is_file()


@pytest.mark.parametrize(("spread", "is_unstable"), [(0.01, False), (0.99, True)])
def test_calibrate_in_groups(spread: float, is_unstable: bool, run: Run, tmp_path: Path) -> None:
    numbers = tmp_path / "groups.npz"
    code, output, seen = run("m", "--groups", "5", "--groups-output", str(numbers), spread=spread)
    assert code == 0, output
    assert [settings.seed for settings in seen["settings"]] == [0, 1, 2, 3, 4]
    assert "5 calibrations on different text" in output
    assert ("The calibration is unstable in layers 0, 1" in output) is is_unstable
    expected = table_stability([varied(seed, spread) for seed in range(5)])
    with np.load(numbers) as arrays:
        assert arrays["row_lengths"].tolist() == [8, 12, 16, 20]
        for index, layer in expected.items():
            np.testing.assert_array_equal(arrays[f"layers.{index}.threshold_mean"], layer.threshold_mean)
            np.testing.assert_array_equal(arrays[f"layers.{index}.threshold_std"], layer.threshold_std)
            np.testing.assert_array_equal(arrays[f"layers.{index}.retention_std"], layer.retention_std)
            np.testing.assert_array_equal(arrays[f"layers.{index}.global_channels"], layer.global_channels)


def test_calibrate_refuses(run: Run, tmp_path: Path) -> None:
    code, output, _ = run("m", "--groups-output", str(tmp_path / "x.npz"))
    assert (code, "--groups-output needs --groups 2 or more" in output) == (1, True)
    code, output, _ = run("m", "--text", str(tmp_path / "gone"))
    assert (code, "does not exist" in output) == (2, True)
    (tmp_path / "cache").write_text("no folder")
    code, output, _ = run("m")
    assert (code, "longmamba calibrate:" in output) == (1, True)


def test_stability_report_of_layers_without_global_channels(tmp_path: Path) -> None:
    layers = table_stability([varied(seed, 0.1) for seed in range(3)], min_retention=1.0)
    assert unstable_layers(layers) == []
    table = stability_table(layers, 3)
    assert table.row_count == 2
    assert list(table.columns[5].cells) == ["-", "-"]
    write_stability(layers, np.array([8, 12, 16, 20]), tmp_path / "out.npz")
    assert (tmp_path / "out.npz").stat().st_size > 0
