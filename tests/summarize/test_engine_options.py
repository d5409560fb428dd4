"""The option block of all commands that start an engine, and what becomes of --engine-args."""

from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from vllm_longmamba.commands.engine_options import EngineOptions, engine_arguments, with_options


def invoked(*arguments: str, without: tuple[str, ...] = ()) -> tuple[Any, str]:
    """(what a command gets, what it prints)."""
    got: list[Any] = []
    app = typer.Typer()

    @app.command()
    @with_options(without=without, engine=EngineOptions)
    def command(model: str, engine: EngineOptions, output: Path = Path("out")) -> None:
        got.append((model, engine, output))

    result = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(app, list(arguments))
    return (got[0] if got else None), " ".join(result.output.split())


def test_the_block() -> None:
    assert invoked("m")[0] == ("m", EngineOptions(), Path("out"))
    more = ["--table", "t", "--min-retention", "0.1", "--train-length", "512", "--tokenizer", "k", "--dtype", "float32"]
    more += ["--max-model-len", "99", "--tp", "2", "--engine-args", '{"max_num_seqs": 4}', "--verbose"]
    expected = EngineOptions(Path("t"), 0.1, 512, "k", 99, "float32", 2, {"max_num_seqs": 4}, True)
    assert invoked("m", *more, "--output", "o")[0] == ("m", expected, Path("o"))
    assert "No such option: --table" in invoked("m", "--table", "t", without=("table",))[1]
    assert invoked("m", without=("table",))[0] == ("m", EngineOptions(), Path("out"))


@pytest.mark.parametrize(("text", "message"), [("{", "not JSON"), ("[]", "must be a JSON object")])
def test_no_json(text: str, message: str) -> None:
    got, said = invoked("m", "--engine-args", text)
    assert got is None
    assert "Invalid value for '--engine-args'" in said
    assert message in said


def test_arguments() -> None:
    assert engine_arguments("m", EngineOptions()) == {
        "model": "m",
        "model_impl": "longmamba",
        "dtype": "auto",
        "tensor_parallel_size": 1,
        "additional_config": {},
    }
    options = EngineOptions(Path("t"), 0.5, tokenizer="k", max_model_len=9, engine_args={"max-num-seqs": 4})
    arguments = engine_arguments("m", options, longmamba={"filter": None, "unfiltered_end": 3}, seed=1)
    assert arguments["additional_config"] == {"longmamba": {"table": "t", "min_retention": 0.5, "unfiltered_end": 3}}
    assert {name: arguments[name] for name in ("tokenizer", "max_model_len", "max_num_seqs", "seed")} == {
        "tokenizer": "k",
        "max_model_len": 9,
        "max_num_seqs": 4,
        "seed": 1,
    }


def test_additional_config_is_merged() -> None:
    """What undid a measurement once: a further option of LongMamba beside those of the command."""
    given = {"additional_config": {"longmamba": {"train_length": 2048}, "other": 1}}
    options = EngineOptions(Path("t"), engine_args=given)
    assert engine_arguments("m", options, longmamba={"filter": False})["additional_config"] == {
        "longmamba": {"train_length": 2048, "table": "t", "filter": False},
        "other": 1,
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": "x"}, "model is set by the model that the command names"),
        ({"tokenizer": "x"}, "tokenizer is set by --tokenizer"),
        ({"max-model-len": 5}, "max_model_len is set by --max-model-len"),
        ({"dtype": "half"}, "dtype is set by --dtype"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size is set by --tensor-parallel-size"),
        ({"seed": 2}, "seed is set by this command itself"),
        ({"model_impl": "auto"}, "model_impl must be longmamba here, got 'auto'"),
        ({"max_num_seq": 2}, "no argument 'max_num_seq'; did you mean max_num_seqs?"),
        ({"additional_config": []}, "additional_config must be an object"),
        ({"additional_config": {"longmamba": 5}}, "additional_config must be an object"),
        ({"additional_config": {"longmamba": {"table": "u"}}}, "says table 'u', and this command has set it to 't'"),
        ({"additional_config": {"longmamba": {"filter": True}}}, "says filter True, and this command has set it to F"),
    ],
)
def test_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^--engine-args: .*{message.replace('?', '.')}"):
        engine_arguments("m", EngineOptions(Path("t"), engine_args=given), longmamba={"filter": False}, seed=0)


def test_stock_vllm() -> None:
    options = EngineOptions(engine_args={"model_impl": "auto"})
    arguments = engine_arguments("m", options, stock_vllm=True)
    assert (arguments["model_impl"], arguments["additional_config"]) == ("auto", {})
    with pytest.raises(ValueError, match="model_impl must be longmamba, auto, vllm, got 'transformers'"):
        engine_arguments("m", EngineOptions(engine_args={"model_impl": "transformers"}), stock_vllm=True)
    with pytest.raises(ValueError, match="vLLM's own model, which has no option table"):
        engine_arguments("m", EngineOptions(Path("t"), engine_args={"model_impl": "vllm"}), stock_vllm=True)


@pytest.mark.parametrize(
    ("module", "cure"),
    [
        ("ray.data", "; install it with pip install 'vllm-longmamba[ray]'"),
        ("pebble", "; install it with pip install 'vllm-longmamba[summarize]'"),
        ("nowhere", ""),
    ],
)
def test_a_missing_package(module: str, cure: str, capsys: pytest.CaptureFixture[str]) -> None:
    @with_options()
    def fail() -> None:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    with pytest.raises(typer.Exit):
        fail()
    assert capsys.readouterr().err == f"longmamba fail: No module named {module!r}{cure}\n"
