"""`longmamba eval` and `longmamba tune` from the command line."""

import json
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from example_modules import EXAMPLES
from typer.testing import CliRunner

from vllm_longmamba.cli import app
from vllm_longmamba.commands.tune import _table_path
from vllm_longmamba.evaluate import engine
from vllm_longmamba.evaluate.store import FILE_NAME
from vllm_longmamba.evaluate.terminal import read_lengths, read_names, read_numbers
from vllm_longmamba.tables import read_metadata

MODEL = str(EXAMPLES / "passkey-mamba2-4m")
HAYSTACK = str(EXAMPLES / "texts" / "haystack.txt")
# Several engines of a test run may share one device.
SHARED = {"gpu_memory_utilization": 0.3}
# Compiling takes longer than what is asked; what users get, the compiled engine, is in test_passkey_as_users_start_it.
EAGER = ["--dtype", "float32", "--engine-args", json.dumps({"enforce_eager": True, **SHARED})]


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result.output


def results_in(folder: Path) -> list[tuple[int, str, str]]:
    """All results; what is measured a second time gets another number."""
    with sqlite3.connect(folder / FILE_NAME) as database:
        return list(database.execute("SELECT rowid, identity, result FROM results ORDER BY rowid"))


def test_read_numbers() -> None:
    assert read_numbers("--lengths", "512, 1024", int) == [512, 1024]
    assert read_numbers("--thetas", "1e-40,0.1", float) == [1e-40, 0.1]
    assert read_numbers("--thetas", "0.05,0.05", float) == [0.05, 0.05]
    for text, kind in (("1.5", int), ("", int), ("0.1;0.2", float)):
        with pytest.raises(ValueError, match=r"--option: expected .*separated by commas"):
            read_numbers("--option", text, kind)
    with pytest.raises(ValueError, match="--seeds: every number may be given once, got 0,1,00"):
        read_numbers("--seeds", "0,1,00", int)


def test_read_lengths() -> None:
    assert read_lengths("--lengths", "512,1") == [512, 1]
    for text in ("512,0", "-512"):
        with pytest.raises(ValueError, match=f"--lengths: every length must be 1 token or more, got {text}"):
            read_lengths("--lengths", text)


def test_read_names() -> None:
    assert read_names("--method", "longmamba, plain", ["plain", "longmamba"]) == ["longmamba", "plain"]
    with pytest.raises(ValueError, match="--method: unknown are magic; known are plain, longmamba"):
        read_names("--method", "plain,magic", ["plain", "longmamba"])
    with pytest.raises(ValueError, match="given once"):
        read_names("--method", "plain,plain", ["plain"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["passkey", MODEL, "--haystack", HAYSTACK, "--method", "magic"], "known are plain, longmamba"),
        (["passkey", MODEL, "--haystack", HAYSTACK, "--decimamba", '{"L_base": 9}'], "with --method decimamba only"),
        (["passkey", MODEL, "--haystack", HAYSTACK, "--lengths", "long"], "whole numbers separated by commas"),
        (["needles", MODEL, "--haystack", HAYSTACK, "--needles", "99"], "must lie between 1 and"),
        (["perplexity", MODEL, "--text", str(EXAMPLES / "passkey-mamba2-4m")], "no .txt file"),
        (["perplexity", MODEL, "--text", HAYSTACK, "--lengths=-512"], "every length must be 1 token or more"),
        (["passkey", MODEL, "--haystack", HAYSTACK, "--max-model-len", "9"], "but --max-model-len is 9; raise it"),
    ],
)
def test_mistakes_are_said_without_a_traceback(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["eval", *arguments, "-o", str(tmp_path)])
    assert result.exit_code == 1
    assert f"longmamba eval {arguments[0]}: " in result.output
    assert message in result.output.replace("\n", " ")
    assert "Traceback" not in result.output


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, dict[str, Any]]]:
    """Whether each engine that a command prepares filters, and its arguments; nothing is started."""
    prepared: list[tuple[bool, dict[str, Any]]] = []

    class Seen:
        def __init__(self, arguments: dict[str, Any], method: str, starting: object) -> None:
            prepared.append((method != "plain", arguments))
            if len(prepared) == 2:
                raise ValueError("seen")
            self.encoder = None

    monkeypatch.setattr(engine, "EngineContestant", Seen)
    return prepared


def text_of(task: str) -> list[str]:
    return {"perplexity": ["--text", HAYSTACK], "ruler": [], "longbench-e": []}.get(task, ["--haystack", HAYSTACK])


@pytest.mark.parametrize("task", ["passkey", "needles", "perplexity", "ruler", "longbench-e"])
@pytest.mark.parametrize(
    ("given", "options"), [([], {}), (["0"], {"unfiltered_end": 0}), (["64"], {"unfiltered_end": 64})]
)
def test_options_reach_the_engine_of_longmamba_only(
    task: str, given: list[str], options: dict[str, int], seen: list[tuple[bool, dict[str, Any]]], tmp_path: Path
) -> None:
    arguments = [*text_of(task), *(f"--unfiltered-end={end}" for end in given), "-o", str(tmp_path)]
    arguments += ["--table", "t.safetensors", "--min-retention", "0.5", "--train-length", "512"]
    further = {"max_num_seqs": 7, "additional_config": {"other": 1, "longmamba": {"calibrate": False}}}
    result = CliRunner().invoke(app, ["eval", task, MODEL, *arguments, "--engine-args", json.dumps(further)])
    assert result.exit_code == 1, result.output
    (plain, of_plain), (longmamba, of_longmamba) = seen
    assert (plain, longmamba) == (False, True)
    both = {"calibrate": False, "train_length": 512}
    assert of_plain["additional_config"] == {"other": 1, "longmamba": {**both, "filter": False}}
    own = {"filter": True, "table": "t.safetensors", "min_retention": 0.5, **options}
    assert of_longmamba["additional_config"] == {"other": 1, "longmamba": {**both, **own}}
    for one in (of_plain, of_longmamba):
        assert (one["model"], one["model_impl"], one["max_num_seqs"]) == (MODEL, "longmamba", 7)


@pytest.mark.parametrize("task", ["passkey", "needles", "perplexity"])
def test_options_reach_the_engine_of_decimamba_only(
    task: str, seen: list[tuple[bool, dict[str, Any]]], tmp_path: Path
) -> None:
    settings = {"layers": [3], "L_base": 512}
    arguments = ["--method", "plain,decimamba", "--decimamba", json.dumps(settings), "--min-retention", "0.5"]
    further = {"max_num_seqs": 7, "additional_config": {"other": 1}}
    arguments += ["--engine-args", json.dumps(further), "-o", str(tmp_path)]
    result = CliRunner().invoke(app, ["eval", task, MODEL, *text_of(task), *arguments])
    assert result.exit_code == 1, result.output
    (_, of_plain), (_, of_decimamba) = seen
    assert of_plain["additional_config"] == {"other": 1, "longmamba": {"filter": False}}
    assert of_decimamba["additional_config"] == of_plain["additional_config"] | {"decimamba": settings}
    changed = {"model_impl": "decimamba", "additional_config": of_decimamba["additional_config"]}
    assert of_decimamba == of_plain | changed


@pytest.mark.parametrize(
    ("further", "message"),
    [
        ({"additional_config": {"longmamba": {"filter": True}}}, "additional_config says filter True"),
        ({"additional_config": {"longmamba": {"filter": False}}}, "additional_config says filter False"),
        ({"additional_config": {"longmamba": {"unfiltered_end": 9}}}, "additional_config says unfiltered_end 9"),
        ({"model": "another"}, "--engine-args: model is set by the model that the command names"),
        ({"model-impl": "auto"}, "model_impl must be longmamba here, got 'auto'"),
        ({"worker_extension_cls": "mine"}, "worker_extension_cls is set by this command itself"),
        ({"max_model_len": 4096}, "max_model_len is set by --max-model-len"),
        ({"no_such_argument": 1}, "has no argument 'no_such_argument'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_a_command_sets_itself_is_refused_by_name(
    further: dict[str, Any], message: str, seen: list[object], tmp_path: Path
) -> None:
    command = ["tune", MODEL, "--text", HAYSTACK, "--train-length", "512", "--lengths", "2048"]
    if "worker_extension_cls" not in further:
        command = ["eval", "passkey", MODEL, "--haystack", HAYSTACK, "--unfiltered-end", "64"]
    result = CliRunner().invoke(app, [*command, "--engine-args", json.dumps(further), "-o", str(tmp_path)])
    assert (result.exit_code, seen) == (1, []), result.output
    assert message in result.output.replace("\n", " ")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--budgets", "0"], "--budgets: budget must be a factor above 0, got 0.0"),
        (["--thetas", "0.1,0.5"], "--thetas must be the smallest and the largest, between 0 and 1, with the default"),
        (["--thetas", "0.05"], "--thetas must be the smallest and the largest, between 0 and 1, with the default"),
        (["--thetas", "0,0.5"], "--thetas must be the smallest and the largest, between 0 and 1, with the default"),
        (["--thetas", "0.01,1"], "--thetas must be the smallest and the largest, between 0 and 1, with the default"),
        (["--unfiltered-ends", "-1"], "--unfiltered-ends: unfiltered_end must be a number of tokens"),
        (["--unfiltered-ends", "0.5"], "whole numbers separated by commas"),
        (["--train-length", "512", "--lengths", "512,640"], "--lengths: prompts of 640 tokens are not filtered"),
        (["--train-length", "512", "--lengths", "9000", "--max-model-len", "900"], "but --max-model-len is 900"),
    ],
)
def test_tune_refuses(given: list[str], message: str, seen: list[object], tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["tune", MODEL, "--text", HAYSTACK, *given, "-o", str(tmp_path)])
    assert (result.exit_code, seen) == (1, []), result.output
    assert message in result.output.replace("\n", " ")


def test_tune_refuses_a_folder_that_is_no_model_in_one_line(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["tune", str(tmp_path), "--text", HAYSTACK, "-o", str(tmp_path / "out")])
    assert result.exit_code == 1
    (line,) = [line for line in result.output.splitlines() if line.startswith("longmamba tune: ")]
    assert "config.json" in line


@pytest.mark.parametrize("name", ["table", "min_retention", "unfiltered_end"])
def test_tune_refuses_what_it_searches(name: str, seen: list[object], tmp_path: Path) -> None:
    further = {"additional_config": {"longmamba": {name: 1}}}
    command = ["tune", MODEL, "--text", HAYSTACK, "--engine-args", json.dumps(further), "-o", str(tmp_path)]
    result = CliRunner().invoke(app, command)
    assert (result.exit_code, seen) == (1, []), result.output
    assert f"additional_config names {name}, which this command searches" in result.output.replace("\n", " ")


@pytest.mark.parametrize("is_named", [True, False], ids=["named", "beside the model"])
def test_tune_does_not_write_its_table_over_another_file(is_named: bool, seen: list[object], tmp_path: Path) -> None:
    path = tmp_path / "longmamba.safetensors"
    path.write_bytes(b"weights")
    command = ["tune", MODEL if is_named else str(tmp_path), "--text", HAYSTACK, "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*command, *(["--table", str(path)] if is_named else [])])
    assert (result.exit_code, seen) == (1, []), result.output
    assert "is there, and no threshold table" in result.output.replace("\n", " ")
    assert path.read_bytes() == b"weights"


@pytest.mark.parametrize(
    ("model", "quantization", "expected"),
    [("model", None, "model/longmamba.safetensors"), ("model", "fp8", "fffff-fp8"), ("org/name", None, "fffff")],
)
def test_the_table_of_tune_lies_where_serving_finds_it(
    model: str, quantization: str | None, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    path = _table_path(model, "fffff", quantization)
    if not expected.startswith("model/"):
        expected = str(tmp_path / "cache" / "vllm_longmamba" / f"{expected}.safetensors")
    assert str(path) == expected


@pytest.mark.parametrize("name", ["results.sqlite", "report.json", "heat-map.png"])
@pytest.mark.parametrize("task", ["passkey", "perplexity"])
def test_a_foreign_file_is_refused_before_anything_starts(
    task: str, name: str, seen: list[object], tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(b'{"precious":1}')
    result = CliRunner().invoke(app, ["eval", task, MODEL, *text_of(task), "-o", str(tmp_path)])
    assert (result.exit_code, seen) == (1, []), result.output
    assert f"{name}: " in result.output.replace("\n", "")
    assert (tmp_path / name).read_bytes() == b'{"precious":1}'


def test_no_name_is_read_as_markup(tmp_path: Path) -> None:
    """Neither in messages nor, where it is a path of a file, anywhere else."""
    command = ["eval", "passkey", MODEL, "--haystack", HAYSTACK, "--method", "[/red][bold]magic", "-o", str(tmp_path)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1
    assert "unknown are [/red][bold]magic; known are" in result.output.replace("\n", " ")


@pytest.mark.engine
def test_passkey(tmp_path: Path) -> None:
    arguments = ["eval", "passkey", MODEL, "--haystack", HAYSTACK, "--depths", "4", "--seeds", "2", *EAGER]
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
    results = results_in(tmp_path)
    assert len(results) == 24
    # Nothing is left to do, so that this starts no engine.
    run(*arguments, "--lengths", "2048")
    assert results_in(tmp_path) == results
    again = json.loads((tmp_path / "report.json").read_text())
    assert again["by_length"] == [row for row in report["by_length"] if row["length"] == 2048]


@pytest.mark.engine
def test_passkey_as_users_start_it(tmp_path: Path) -> None:
    """Compiled, in the model's dtype, without an option of the engine."""
    arguments = ["eval", "passkey", MODEL, "--haystack", HAYSTACK, "--depths", "4", "--seeds", "2"]
    arguments += ["--engine-args", json.dumps(SHARED), "--method", "longmamba", "--lengths", "2048"]
    run(*arguments, "-o", str(tmp_path))
    (row,) = json.loads((tmp_path / "report.json").read_text())["by_length"]
    assert row["share"] == 1.0


@pytest.mark.slow
@pytest.mark.engine
def test_tune(tmp_path: Path) -> None:
    model = Path(shutil.copytree(MODEL, tmp_path / "model"))
    arguments = ["tune", str(model), "--text", HAYSTACK, "--train-length", "512", "--max-length", "4096", *EAGER]
    arguments += ["--calibration-text", str(EXAMPLES / "texts" / "calibration.txt"), "--budgets", "0.5"]
    arguments += ["--unfiltered-ends", "64", "--trials", "5", "--lengths", "2048", "--depths", "3", "--windows", "2"]
    arguments += ["-o", str(tmp_path / "out")]
    shown = " ".join(run(*arguments).split())
    assert f"as its default: {model}/longmamba.safetensors" in shown
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    tried = {tuple(score["setting"].values()): score for score in report["tried"]}
    assert {(1.0, 0.05, 0), (0.5, 0.05, 0), (1.0, 0.05, 64), (0.5, 0.05, 64)} < set(tried)
    assert len(tried) == 5
    assert tried[1.0, 0.05, 0]["found"]["share"] > report["plain"]["found"]["share"]
    assert report["plain"]["difference"]["loss"] == 0.0
    best = report["best"]["setting"]
    held_out = [score["setting"] for score in report["held_out"]]
    assert (held_out[0], held_out[-1]) == (report["plain"]["setting"], best)
    assert (tmp_path / "out" / "tuning.png").is_file()
    metadata = read_metadata(model / "longmamba.safetensors")
    assert (metadata.budget, metadata.min_retention, metadata.unfiltered_end) == tuple(best.values())
    assert metadata.train_length == 512
    # Nothing is calibrated or scored a second time. (A process of vLLM remembers what files a model has.)
    (model / "longmamba.safetensors").unlink()
    results = results_in(tmp_path / "out")
    run(*arguments)
    assert results_in(tmp_path / "out") == results
    assert len(list((tmp_path / "out" / "tables").glob("budget*.safetensors"))) == 2
