"""The `longmamba calibrate` command without an engine: what it passes on, writes and prints."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_tables import small_table
from typer.testing import CliRunner

import vllm_longmamba.calibration.offline as offline
from vllm_longmamba.calibration.settings import CalibrationSettings
from vllm_longmamba.cli import app
from vllm_longmamba.tables import ThresholdTable, load_table

Run = Callable[..., Any]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Function: arguments -> (exit code, output, the arguments of `calibrate`)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # Wide enough for paths.
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: str) -> tuple[int, str, dict[str, Any]]:
        seen: dict[str, Any] = {}

        def calibrate(model: str, settings: CalibrationSettings, **kwargs: Any) -> ThresholdTable:
            seen.update(kwargs, model=model, settings=settings)
            return small_table()

        monkeypatch.setattr(offline, "calibrate", calibrate)
        result = CliRunner().invoke(app, ["calibrate", *arguments])
        return result.exit_code, result.output, seen

    return call


def test_calibrate_by_default(run: Run, tmp_path: Path) -> None:
    code, output, seen = run("org/model")
    assert code == 0, output
    path = tmp_path / "cache" / "vllm_longmamba" / f"{'f' * 32}.safetensors"
    assert load_table(path).digest() == small_table().digest()
    assert f"wrote {path}: 2 layers, 2 of 6 channels global, rows up to 20 tokens" in output
    assert path.parent.stat().st_mode & 0o077 == 0
    assert seen == {
        "model": "org/model",
        "settings": CalibrationSettings(),
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
    assert seen["settings"] == CalibrationSettings(
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
        ("--method paper --unfiltered-end 3", CalibrationSettings(method="paper", unfiltered_end=3)),
    ],
)
def test_calibrate_by_a_method(options: str, expected: CalibrationSettings, run: Run) -> None:
    code, printed, seen = run("m", *options.split())
    assert code == 0, printed
    assert seen["settings"] == expected


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ("--method paper --budget 2", 1, "the method paper has no budget but that of the training length, got 2.0"),
        ("--clamp-percent 5 --budget 0.5", 1, "the method paper has no budget but that of the training length"),
        ("--budget 0", 1, "budget must be a factor above 0, got 0.0"),
        ("--method open", 1, "method must be one of unclamped, paper, got 'open'"),
        ("--method closed-loop", 1, "method must be one of unclamped, paper, got 'closed-loop'"),
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


def test_calibrate_writes_over_tables_only(run: Run, tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"weights")
    for path in (weights, tmp_path):
        code, output, seen = run("m", "-o", str(path))
        assert (code, seen) == (1, {})
        assert f"{path}: is there, and no threshold table" in output
    assert weights.read_bytes() == b"weights"
    table = tmp_path / "table.safetensors"
    assert [run("m", "-o", str(table))[0] for _ in range(2)] == [0, 0]


def test_calibrate_refuses_a_folder_that_is_not_writable_before_the_engine_starts(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    code, output, seen = run("m", "-o", str(tmp_path / "table.safetensors"))
    assert (code, seen) == (1, {})
    assert "the folder must not be written to; give another path, --output" in output


def test_calibrate_refuses(run: Run, tmp_path: Path) -> None:
    code, output, _ = run("m", "--text", str(tmp_path / "gone"))
    assert (code, "does not exist" in output) == (2, True)
    (tmp_path / "cache").write_text("no folder")
    code, output, _ = run("m")
    assert (code, "longmamba calibrate:" in output) == (1, True)
