"""`longmamba eval` and `longmamba tune` from the command line."""

import json
from pathlib import Path

import pytest
from example_modules import EXAMPLES
from tiny_models import write_mamba1_original
from typer.testing import CliRunner

from vllm_longmamba.cli import app
from vllm_longmamba.commands import evaluate, lm_eval
from vllm_longmamba.evaluate import tuning_run
from vllm_longmamba.evaluate.command_line import engine_arguments, numbers, real_numbers
from vllm_longmamba.evaluate.methods import ModelSettings
from vllm_longmamba.evaluate.tuning_settings import TuningSettings
from vllm_longmamba.tables import read_metadata

MODEL = str(EXAMPLES / "passkey-mamba2-4m")
HAYSTACK = str(EXAMPLES / "texts" / "haystack.txt")
ENGINE = ["--dtype", "float32", "--engine-arg", "enforce_eager=true", "--engine-arg", "gpu_memory_utilization=0.3"]


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result.output


def test_engine_arguments() -> None:
    further = ["max-num-seqs=64", "load_format=dummy", 'hf_overrides={"a": 1}', "enforce_eager=true", "dtype=half"]
    assert engine_arguments("auto", "some/tokenizer", 2, 4096, further) == {
        "dtype": "half",
        "tokenizer": "some/tokenizer",
        "tensor_parallel_size": 2,
        "max_model_len": 4096,
        "max_num_seqs": 64,
        "load_format": "dummy",
        "hf_overrides": {"a": 1},
        "enforce_eager": True,
    }
    with pytest.raises(ValueError, match=r"must be NAME=VALUE, .* got 'max_num_seqs'"):
        engine_arguments("auto", None, 1, None, ["max_num_seqs"])


def test_numbers() -> None:
    assert numbers("512, 1024") == [512, 1024]
    assert real_numbers("1e-40,0.1") == [1e-40, 0.1]
    for read, text in ((numbers, "1.5"), (numbers, ""), (real_numbers, "0.1;0.2")):
        with pytest.raises(ValueError, match="separated by commas"):
            read(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["passkey", MODEL, "--haystack", HAYSTACK, "--method", "magic"], "known are plain, longmamba"),
        (["passkey", MODEL, "--haystack", HAYSTACK, "--method", "plain,decimamba"], "needs settings: --decimamba"),
        (["passkey", MODEL, "--haystack", HAYSTACK, "--decimamba", "[3]"], "--decimamba must be JSON, a file of it"),
        (["passkey", MODEL, "--haystack", HAYSTACK, "--lengths", "long"], "whole numbers separated by commas"),
        (["needles", MODEL, "--haystack", HAYSTACK, "--ask", "some"], "--ask must be one or all, got 'some'"),
        (["needles", MODEL, "--haystack", HAYSTACK, "--needles", "99"], "must lie between 1 and"),
        (["perplexity", MODEL, "--text", str(EXAMPLES / "passkey-mamba2-4m")], "no .txt file"),
    ],
)
def test_mistakes_are_said_without_a_traceback(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["eval", *arguments, "-o", str(tmp_path)])
    assert result.exit_code == 1
    assert f"longmamba eval {arguments[0]}: " in result.output
    assert message in result.output.replace("\n", " ")
    assert "Traceback" not in result.output


@pytest.mark.parametrize("task", ["passkey", "needles", "perplexity", "ruler", "longbench-e"])
@pytest.mark.parametrize(
    ("given", "options"), [([], {}), (["0"], {"unfiltered_end": 0}), (["64"], {"unfiltered_end": 64})]
)
def test_the_unfiltered_end_is_handed_on(
    task: str, given: list[str], options: dict[str, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen = []

    def compared(model: str, method: str, options: dict[str, int], *_: object) -> None:
        seen.append(options)
        raise ValueError("seen")

    def run_benchmark(benchmark: object, model: ModelSettings, *_: object) -> None:
        compared(model.model, "", dict(model.options))

    monkeypatch.setattr(evaluate, "_compared", compared)
    monkeypatch.setattr(lm_eval, "_run", run_benchmark)
    text = {
        "passkey": ["--haystack", HAYSTACK],
        "needles": ["--haystack", HAYSTACK],
        "perplexity": ["--text", HAYSTACK],
    }
    arguments = [*text.get(task, []), *(f"--unfiltered-end={end}" for end in given), "-o", str(tmp_path)]
    result = CliRunner().invoke(app, ["eval", task, MODEL, *arguments])
    assert (result.exit_code, seen) == (1, [options]), result.output


@pytest.mark.parametrize(("given", "expected"), [([], [0]), (["--unfiltered-ends", "0,64"], [0, 64])])
def test_tune_tries_the_unfiltered_ends(
    given: list[str], expected: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen = []

    def tune_model(model: str, settings: TuningSettings, *_: object) -> None:
        seen.append(list(settings.grid.unfiltered_ends))
        raise ValueError("seen")

    monkeypatch.setattr(tuning_run, "tune_model", tune_model)
    result = CliRunner().invoke(app, ["tune", MODEL, "--held-out", HAYSTACK, *given, "-o", str(tmp_path)])
    assert (result.exit_code, seen) == (1, [expected]), result.output


@pytest.mark.engine
def test_passkey(tmp_path: Path) -> None:
    arguments = ["eval", "passkey", MODEL, "--haystack", HAYSTACK, "--depths", "4", "--seeds", "2", *ENGINE]
    arguments += ["--method", "plain,decimamba,longmamba", "--decimamba", '{"layers": [6], "L_base": 1024}']
    arguments += ["-o", str(tmp_path)]
    shown = run(*arguments, "--lengths", "512,2048")
    assert "numbers found" in shown
    report = json.loads((tmp_path / "report.json").read_text())
    shares = {(row["method"], row["length"]): row["share"] for row in report["by_length"]}
    # All of the few keys of this seed are found. DeciMamba keeps all of a prompt of 512 tokens.
    assert shares["plain", 512] == shares["decimamba", 512] == shares["longmamba", 512] == 1.0
    assert shares["plain", 2048] <= 0.5
    assert shares["longmamba", 2048] == 1.0
    assert report["methods"]["longmamba"]["train_length"] == 512
    assert report["methods"]["decimamba"]["decimamba"]["layers"] == [6]
    assert report["settings"]["seeds"] == [2]
    assert (tmp_path / "report.md").read_text().count("![") == 2
    records = (tmp_path / "records.jsonl").read_text()
    assert records.count("\n") == 24
    # Nothing is left to do, so that this starts no engine.
    run(*arguments, "--lengths", "2048")
    assert (tmp_path / "records.jsonl").read_text() == records
    again = json.loads((tmp_path / "report.json").read_text())
    assert again["by_length"] == [row for row in report["by_length"] if row["length"] == 2048]


@pytest.mark.parametrize("task", ["passkey", "perplexity"])
def test_searching_for_decimamba(task: str, tmp_path: Path) -> None:
    model = str(write_mamba1_original(tmp_path / "mamba1"))
    arguments = ["eval", task, model, "--method", "torch-plain,decimamba", "--decimamba", "search", "--lengths", "150"]
    of_task = {
        "passkey": ["--haystack", HAYSTACK, "--depths", "1", "--seeds", "4"],
        "perplexity": ["--text", HAYSTACK, "--windows", "1", "--scored-tokens", "20"],
    }
    run(*arguments, *of_task[task], "-o", str(tmp_path / "out"))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    found = json.loads((tmp_path / "out" / "decimamba.json").read_text())
    assert report["methods"]["decimamba"]["decimamba"] == found["settings"]
    assert [row["method"] for row in report["by_length"]] == ["torch-plain", "decimamba"]
    # Given as a file, the settings are the same, and nothing has to be computed again.
    records = (tmp_path / "out" / "records.jsonl").read_text()
    arguments[arguments.index("search")] = str(tmp_path / "out" / "decimamba.json")
    run(*arguments, *of_task[task], "-o", str(tmp_path / "out"))
    assert (tmp_path / "out" / "records.jsonl").read_text() == records


@pytest.mark.slow
@pytest.mark.engine
def test_tune(tmp_path: Path) -> None:
    arguments = ["tune", MODEL, "--text", str(EXAMPLES / "texts" / "calibration.txt"), "--held-out", HAYSTACK]
    arguments += ["--train-length", "512", "--max-length", "4096", "--clamp-percents", "5", "--thetas", "1e-30,1e-2"]
    arguments += ["--refine", "0", "--lengths", "2048", "--depths", "3", "--windows", "2", *ENGINE]
    arguments += ["-o", str(tmp_path / "out"), "--table", str(tmp_path / "best.safetensors"), "--search-unfiltered"]
    assert "keys found" in run(*arguments)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    tried = sorted(report["tried"], key=lambda score: score["candidate"]["global_channels"])
    few, many = (score for score in tried if not score["candidate"]["unfiltered"])
    assert few["candidate"]["min_retention"] == report["best"]["min_retention"] == 1e-2
    left_out = [score for score in tried if score["candidate"]["unfiltered"]]
    assert left_out
    for score in left_out:
        setting = score["candidate"]
        assert setting["global_channels"] == few["candidate"]["global_channels"] - len(setting["unfiltered"])
    assert few["found"]["share"] == 1.0
    assert 0 < few["candidate"]["global_channels"] < many["candidate"]["global_channels"]
    assert report["plain"]["found"]["share"] < 1.0
    assert report["plain"]["difference"]["loss"] == 0.0
    metadata = read_metadata(tmp_path / "best.safetensors")
    assert (metadata.min_retention, metadata.clamp_percent, metadata.train_length) == (1e-2, 5.0, 512)
    assert sorted(metadata.unfiltered) == sorted(report["best"]["unfiltered"])
    # Nothing is calibrated or scored a second time.
    records = (tmp_path / "out" / "records.jsonl").read_bytes()
    run(*arguments)
    assert (tmp_path / "out" / "records.jsonl").read_bytes() == records
    assert len(list((tmp_path / "out").glob("table-*.safetensors"))) == 1


@pytest.mark.engine
@pytest.mark.slow
def test_tune_closed_loop(tmp_path: Path) -> None:
    arguments = ["tune", MODEL, "--method", "closed-loop", "--held-out", HAYSTACK, "--train-length", "512"]
    arguments += ["--max-length", "4096", "--thetas", "1e-3,0.05", "--sequences", "3", "--lengths", "2048"]
    arguments += ["--depths", "4", "--windows", "2", "--needles", "2", *ENGINE]
    arguments += ["-o", str(tmp_path / "out"), "--table", str(tmp_path / "best.safetensors")]
    assert "Tuning of the closed loop" in run(*arguments)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    many, few = report["tried"]
    assert [one["candidate"]["min_retention"] for one in (many, few)] == [1e-3, 0.05]
    assert 0 < few["candidate"]["global_channels"] < many["candidate"]["global_channels"]
    assert few["found"]["share"] > report["plain"]["found"]["share"]
    assert report["best"] in [{"budget": 1.0, "min_retention": theta} for theta in (1e-3, 0.05)]
    assert report["settings"]["method"] == "closed-loop"
    assert report["settings"]["needles"] == 2
    assert few["found"]["questions"] == 8  # a key and a needle at each depth
    metadata = read_metadata(tmp_path / "best.safetensors")
    assert (metadata.method, metadata.min_retention) == ("closed-loop", report["best"]["min_retention"])
    assert metadata.closed_loop is not None
    assert metadata.closed_loop.lengths[-1] == report["settings"]["measured"][-1] == 2048
    # Each theta has a table of its own; nothing is calibrated or scored a second time.
    tables = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("table-*.safetensors")}
    assert set(tables) == {one["candidate"]["table"] for one in (few, many)}
    records = (tmp_path / "out" / "records.jsonl").read_bytes()
    run(*arguments)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("table-*.safetensors")} == tables
    assert (tmp_path / "out" / "records.jsonl").read_bytes() == records
