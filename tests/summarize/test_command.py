"""The command line: what is refused, the dry run, exit codes, and what comes with the package."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from typer.testing import CliRunner

from vllm_longmamba.chat_templates import PASS_THROUGH
from vllm_longmamba.cli import app
from vllm_longmamba.commands.engine_options import EngineOptions, engine_arguments
from vllm_longmamba.summarize.engine import EngineBackend
from vllm_longmamba.summarize.ray_data import plugin_modules
from vllm_longmamba.summarize.settings import JobSettings, Sampling

from .conftest import EXAMPLE_MODEL
from .documents import write_jsonl
from .stub_server import StubServer, answer


def invoke(*arguments: str) -> tuple[int, str]:
    """(exit code, output with single spaces) of `longmamba summarize`."""
    result = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(app, ["summarize", *arguments])
    return result.exit_code, " ".join(result.output.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--model is needed"),
        (
            ["--model", "m", "--fit", "squeeze"],
            "Invalid value for '--fit'",
        ),
        (["--model", "m", "--prompt", "x"], "Invalid value for '--prompt'"),
        (["--model", "m", "--drop", "x"], "Invalid value for '--drop'"),
        (["--model", "m", "--encoding", "x"], "--encoding: Python knows no 'x'"),
        (["--model", "m", "--engine-args", '{"max_seqs": 3}'], "--engine-args: vLLM's engine has no argument"),
        (["--model", "m", "--engine-args", '{"tokenizer": "t"}'], "--engine-args: tokenizer is set by --tokenizer"),
        (["--base-url", "http://user:secret@/v1"], "--base-url must be an address such as http://localhost:8000/v1"),
        (["--base-url", "http://localhost:1/v1", "--ray", "auto"], "--base-url and --ray exclude each other"),
        (
            ["--model", "m", "--template", "missing.jinja"],
            "Invalid value for '--template': 'missing.jinja': No such file",
        ),
    ],
)
def test_wrong_arguments(tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "a.txt").write_text("text")
    code, said = invoke(str(tmp_path / "a.txt"), "-o", str(tmp_path / "out.jsonl"), *arguments)
    assert code == (2 if message.startswith("Invalid value") else 1)
    assert message in said
    assert "secret" not in said


def test_a_package_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.startswith("vllm_longmamba.summarize.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "pebble", None)
    code, said = invoke(str(tmp_path), "--output", str(tmp_path / "o.jsonl"), "--base-url", "http://localhost:1/v1")
    assert (code, said.partition(": ")[2]) == (1, "pebble not installed; run pip install 'vllm-longmamba[summarize]'")


def test_help_texts_are_whole() -> None:
    """Square brackets would be taken for markup."""
    assert "(default: id where a row has one, else file#row)" in invoke("--help")[1]


def test_no_traceback_shows_a_value() -> None:
    """Such as a key or a password."""
    assert app.pretty_exceptions_show_locals is False


def test_a_job(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"key": "a", "body": "x y z"}, {"key": "b", "body": "REFUSE"}])
    (tmp_path / "own.jinja").write_text("{{ instruction }} {{ document }}")
    arguments = [str(tmp_path / "rows.jsonl"), "-o", str(tmp_path / "out.jsonl"), "--text-column", "body"]
    arguments += ["--id-column", "key", "--template", str(tmp_path / "own.jinja"), "--instruction", "Read"]
    with StubServer() as server:
        code, said = invoke(*arguments, "--base-url", server.url)
    assert code == 3
    assert "1 error rows: 1 refused" in said
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert {row["id"]: row["summary"] for row in rows} == {"a": answer("Read x y z"), "b": None}


def test_dry_run_counts(tmp_path: Path) -> None:
    """Without an engine: tokens of the example model's tokenizer."""
    write_jsonl(tmp_path / "rows.jsonl", [{"id": f"d{size}", "text": "x" * size} for size in (10, 500, 2000)])
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    arguments = [str(tmp_path), "-o", str(tmp_path / "out.parquet"), "--model", str(EXAMPLE_MODEL), "--dry-run"]
    arguments += ["--max-model-len", "1000", "--max-tokens", "100"]
    code, said = invoke(*arguments)
    assert code == 0, said
    assert "2 files, 3 documents to answer, 2,534 prompt tokens (longest 2,008), up to 300 output tokens" in said
    assert "1 do not fit in 900 prompt tokens and would be error rows (see --fit): 2,008 d2000" in said
    assert "1 cannot be read: 1 unreadable" in said
    code, said = invoke(*arguments, "--fit", "map-reduce")
    assert "would take 3 sections or more" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.txt", "rows.jsonl"]
    os.mkfifo(tmp_path / "pipe.txt")
    assert "2 cannot be read: 2 unreadable" in invoke(*arguments)[1]


def test_dry_run_asks_nothing(tmp_path: Path) -> None:
    """Of a server it wants the list of models; no document goes there, and no row is written."""
    write_jsonl(tmp_path / "rows.jsonl", [{"id": str(number), "text": "x y " * 50} for number in range(20)])
    with StubServer() as server:
        common = [str(tmp_path), "-o", str(tmp_path / "out.jsonl"), "--base-url", server.url]
        assert invoke(*common, "--limit", "12")[0] == 0
        rows = (tmp_path / "out.jsonl").read_bytes()
        asked = sum(server.requests.values())
        code, said = invoke(*common, "--dry-run")
        assert sum(server.requests.values()) == asked
    assert code == 0
    assert "8 documents to answer, 1,848 characters of prompts (nobody here can count tokens; see --tokenizer)" in said
    assert "12 done before" in said
    assert (tmp_path / "out.jsonl").read_bytes() == rows


def test_dry_run_without_its_server(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    common = [str(tmp_path), "-o", str(tmp_path / "out.jsonl"), "--base-url", "http://127.0.0.1:9/v1"]
    code, said = invoke(*common, "--dry-run", "--retry-for", "0.1")
    assert code == 1
    assert "http://127.0.0.1:9/v1 gives no list of models" in said


def test_the_settings_hash_covers_what_changes_answers() -> None:
    def settings(**more: Any) -> JobSettings:
        return JobSettings(inputs=("a",), output=Path("b.jsonl"), model="m", **more)

    same = [settings(), settings(concurrency=3), settings(engine={"max_num_seqs": 2}), settings(limit=1)]
    assert len({each.answer_hash() for each in same}) == 1
    other = [settings(instruction="x"), settings(max_model_len=5), settings(engine={"dtype": "float32"})]
    other.append(settings(engine={"additional_config": {"longmamba": {"table": "t"}}}))
    assert len({each.answer_hash() for each in [*other, same[0]]}) == 5


def test_steps_as_large_as_those_of_llm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless told otherwise, the engine takes a bare `LLM`'s tokens for a step and sequences at a time."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    class Asked(Exception):  # noqa: N818
        """Carries the configuration that the engine would be started with."""

    def config_only(arguments: Any, usage_context: Any) -> None:
        raise Asked(arguments.create_engine_config(usage_context).scheduler_config)

    monkeypatch.setattr(AsyncLLM, "from_engine_args", config_only)
    arguments = engine_arguments(str(EXAMPLE_MODEL), EngineOptions(max_model_len=16384, dtype="float32"))
    with pytest.raises(Asked) as asked:
        EngineBackend(arguments, Sampling())
    expected = AsyncEngineArgs(**arguments).create_engine_config(UsageContext.LLM_CLASS).scheduler_config
    scheduler = asked.value.args[0]
    assert scheduler.max_num_batched_tokens == expected.max_num_batched_tokens
    assert scheduler.max_num_seqs == expected.max_num_seqs


def test_pass_through_template() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "vllm_longmamba.chat_templates"], capture_output=True, text=True, check=True
    )
    assert Path(shown.stdout.strip()) == PASS_THROUGH
    template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(PASS_THROUGH.read_text())
    messages = [{"role": "system", "content": "a\n\n"}, {"role": "user", "content": " b {{ c }}\n"}]
    assert template.render(messages=messages, add_generation_prompt=True) == "a\n\n b {{ c }}\n"


def test_the_plugin_travels(tmp_path: Path) -> None:
    """What Ray sends to its workers is the whole plugin, and vLLM finds it there."""
    modules = [Path(path) for path in plugin_modules(tmp_path)]
    assert [path.name for path in modules] == ["vllm_longmamba", "vllm_longmamba-0.1.0.dist-info"]
    code = """
import sys
from importlib.metadata import entry_points
sys.path[:] = [sys.argv[1]] + [path for path in sys.path if not path.endswith("main") and "__editable__" not in path]
sys.meta_path[:] = [finder for finder in sys.meta_path if "ditable" not in repr(finder)]
(entry,) = entry_points(group="vllm.general_plugins", name="longmamba")
function = entry.load()
import vllm_longmamba.kernels, vllm_longmamba.tables.shipped
print(sys.modules[function.__module__].__file__, vllm_longmamba.kernels.__file__, vllm_longmamba.tables.__file__)
"""
    ran = subprocess.run(
        [sys.executable, "-c", code, tmp_path], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    package = tmp_path / "vllm_longmamba"
    assert ran.stdout.split() == [
        str(package / "plugin.py"),
        str(package / "kernels" / "__init__.py"),
        str(package / "tables" / "__init__.py"),
    ]
