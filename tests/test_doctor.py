"""`longmamba doctor`: what it reports, what it calls wrong, and that it tells no secret."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from documents import ROOT
from example_modules import EXAMPLES
from tiny_models import write_mamba2_original
from typer.testing import CliRunner

from vllm_longmamba import commands, compatibility
from vllm_longmamba.checkpoint.table_lookup import cache_folder
from vllm_longmamba.cli import app
from vllm_longmamba.compatibility import IncompatibleVllmError
from vllm_longmamba.engine import drift
from vllm_longmamba.engine.patch import Patch

Doctor = Callable[..., tuple[int, dict[str, list[str]]]]


@pytest.fixture
def doctor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Doctor:
    """Function: arguments -> (exit code, label -> what stands behind it, in order)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(*arguments: Any) -> tuple[int, dict[str, list[str]]]:
        result = CliRunner().invoke(app, ["doctor", *map(str, arguments)], catch_exceptions=False)
        lines: dict[str, list[str]] = {}
        for line in result.stdout.splitlines():
            label, colon, text = line.partition(":")
            lines.setdefault(label if colon else "", []).append(text.strip() if colon else line)
        return result.exit_code, lines

    return run


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without a table, whose training length is not known."""
    return write_mamba2_original(tmp_path_factory.mktemp("models") / "tiny", n_layer=1)


def longmamba(**options: Any) -> tuple[str, str]:
    return "--additional-config", json.dumps({"longmamba": options})


def test_installation(doctor: Doctor) -> None:
    code, report = doctor()
    assert code == 0, report
    assert report["vLLM"] == [compatibility.installed_vllm_version()]
    assert "torch " in report["packages"][0]
    assert report["plugin"] == ["vLLM finds it"]
    assert "fit this vLLM" in report["patches"][0]
    assert "WRONG" not in report
    assert report[""] == ["nothing wrong was found; name a model to check it, too"]


@pytest.mark.parametrize(
    ("example", "where", "first"),
    [
        ("reference-mamba1-4m", "(beside the weights, made for these weights)", 641),
        ("passkey-mamba2-4m", "(comes with the package, made for these weights)", 641),
    ],
)
def test_model_with_a_table(example: str, where: str, first: int, doctor: Doctor) -> None:
    code, report = doctor(EXAMPLES / example, "--dtype", "float32", "--max-num-seqs", "32", "--max-model-len", "4096")
    assert code == 0, report
    assert report["table"][0].endswith(where)
    assert report["training length"] == ["512 tokens (the table's)"]
    assert report["filter"] == [f"prompts of {first} tokens and more"]
    assert report["longest prompt"] == ["4096 tokens with its answer"]
    assert "chunked prefill: works" in report["feature on"]
    assert not any("tensor parallelism" in line for line in report["feature on"])


def test_model_without_a_table(tiny: Path, doctor: Doctor) -> None:
    code, report = doctor(tiny, *longmamba(train_length=96))
    assert code == 0, report
    assert report["class"] == ["Mamba2ForCausalLM, served as LongMamba2ForCausalLM"]
    assert report["table"][0].startswith(str(cache_folder()))
    assert report["table"][0].endswith("(the engine makes it at its start)")
    assert report["training length"] == ["96 tokens (the option train_length)"]
    # Rows are L/2 apart: the second one is for 144 tokens.
    assert report["filter"] == ["prompts of 121 tokens and more"]


def test_features_of_a_command_line(tiny: Path, doctor: Doctor) -> None:
    code, report = doctor(
        tiny, *longmamba(train_length=96), "--mamba-ssm-cache-dtype", "float32", "--enable-prefix-caching"
    )
    assert code == 0, report
    assert "`--mamba-ssm-cache-dtype`: works" in report["feature on"]
    assert "prefix cache: works" in report["feature on"]


def test_filter_off(tiny: Path, doctor: Doctor) -> None:
    code, report = doctor(tiny, *longmamba(filter=False))
    assert code == 0, report
    assert report["filter"] == ["off, as the option filter says: the plain model is served"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), 'Say how many tokens it was trained on, --additional-config \'{"longmamba": {"train_length": N}}\''),
        (longmamba(train_length=96, calibrate="no"), "calibrate must be true or false"),
        (longmamba(train_length=96, table="gone"), "there is no such file; make a new one with `longmamba calibrate"),
        ((*longmamba(train_length=96), "--weight-transfer-config", '{"backend": "nccl"}'), "leave it out"),
        ((*longmamba(train_length=96), "--max-model-len", "100"), "--max-model-len allows. Raise it"),
        ((*longmamba(train_length=96), "--model-impl", "decimamba"), "leave it out"),
    ],
    ids=["training length", "option", "table", "feature", "short", "decimamba"],
)
def test_what_is_wrong_with_a_model(arguments: tuple[str, ...], message: str, tiny: Path, doctor: Doctor) -> None:
    code, report = doctor(tiny, *arguments)
    assert code == 1
    (problem,) = report["WRONG"]
    assert message in problem


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--max-modle-len", "4096"), "vllm serve: unrecognized arguments: --max-modle-len; `vllm serve --help=all`"),
        (("--max-model-len", "many"), "vllm serve: argument --max-model-len: invalid"),
        (
            ("--additional-config", '{"longmamba"'),
            """--additional-config must be a JSON object, but is '{"longmamba"'""",
        ),
    ],
    ids=["name", "value", "json"],
)
def test_arguments_that_vllm_does_not_take(
    arguments: tuple[str, ...], message: str, tiny: Path, doctor: Doctor
) -> None:
    code, report = doctor(tiny, *arguments)
    assert code == 1
    (problem,) = report["WRONG"]
    assert problem.startswith(message)


def test_arguments_without_a_model(doctor: Doctor) -> None:
    code, report = doctor("--dtype", "float32")
    assert code == 1
    assert report["WRONG"] == ["name the model first, as for `vllm serve`"]


def test_arguments_in_a_file(tiny: Path, doctor: Doctor, tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(f"model: {tiny}\nmax-model-len: 500\nadditional-config:\n  longmamba:\n    train_length: 96\n")
    code, report = doctor("--config", file)
    assert code == 0, report
    assert report["model"] == [str(tiny)]
    assert report["longest prompt"] == ["500 tokens with its answer"]


def test_no_such_model(doctor: Doctor, tmp_path: Path) -> None:
    code, report = doctor(tmp_path / "none")
    assert code == 1
    assert len(report["WRONG"]) == 1


def test_another_vllm(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise IncompatibleVllmError("it was tested with another; install that")

    monkeypatch.setattr("vllm_longmamba.commands.doctor.check_vllm_version", refuse)
    code, report = doctor(EXAMPLES / "passkey-mamba2-4m")
    assert code == 1
    assert report["WRONG"] == ["IncompatibleVllmError: it was tested with another; install that"]
    # Nothing more can be said.
    assert "model" not in report


def test_a_changed_vllm(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = Patch("vllm.version", None, "nothing_like_it", (), lambda original: original, "none")
    monkeypatch.setattr("vllm_longmamba.engine.patches.PATCHES", (gone,))
    code, report = doctor()
    assert code == 1
    assert "cannot extend vllm.version.nothing_like_it of this vLLM: it does not exist" in report["WRONG"][0]


@pytest.fixture
def newer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The installed vLLM says that it is a later one than those that were tested."""
    drift.check_newer_vllm.cache_clear()
    for module in (drift, commands.doctor):
        monkeypatch.setattr(module, "installed_vllm_version", lambda: "0.99.0")


@pytest.mark.usefixtures("newer")
def test_a_newer_vllm(doctor: Doctor) -> None:
    code, report = doctor()
    assert code == 0, report
    assert report["newer vLLM"] == ["not tested, but it has all that LongMamba relies on by name"]


@pytest.mark.usefixtures("newer")
def test_a_newer_vllm_that_lacks_something(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift, "SYMBOLS", [("vllm:Gone", "b.py")])
    code, report = doctor()
    assert code == 1
    assert "vLLM 0.99.0 is installed, in which vllm:Gone is gone" in report["WRONG"][0]


def test_a_plugin_that_is_not_loaded(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "another")
    code, report = doctor()
    assert code == 1
    assert report["variables"][0].startswith("VLLM_PLUGINS=another")
    assert "VLLM_PLUGINS does not name longmamba" in report["WRONG"][0]


def test_no_secrets(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_sesame")
    monkeypatch.setenv("VLLM_API_KEY", "sesame")
    monkeypatch.setenv("HOME", str(tiny.parent))
    arguments = ["--api-key", "sesame", "--api-key=sesame", "--hf-token", "hf_sesame", "--hf-overrides", "{}"]
    given = ["doctor", str(tiny), *longmamba(train_length=96), *arguments]
    result = CliRunner().invoke(app, given, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "sesame" not in result.output
    assert str(tiny.parent) not in result.output
    assert "~/tiny" in result.output


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--api-kye", "sesame"), "arguments: --api-kye;"),
        (("--api-kye=sesame",), "arguments: --api-kye;"),
        (("--a=sesame",), "option: --a could match"),
    ],
    ids=["two words", "one word", "ambiguous"],
)
def test_no_secrets_behind_a_wrong_name(arguments: tuple[str, ...], named: str, tiny: Path) -> None:
    result = CliRunner().invoke(app, ["doctor", str(tiny), *arguments], catch_exceptions=False)
    assert result.exit_code == 1
    assert named in result.output
    assert "sesame" not in result.output


def test_bug_reports_ask_for_it() -> None:
    assert "longmamba doctor" in (ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text()
