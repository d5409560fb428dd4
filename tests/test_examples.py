"""The examples: the passkey task, and that every script at least starts. `make demo` runs them for real."""

import subprocess
import sys
from pathlib import Path

import pytest
from example_modules import EXAMPLES, load_example

passkey = load_example("passkey")
HAYSTACK = passkey.read_haystack()


@pytest.mark.parametrize("length", [77, 512, 1000, 8192])
@pytest.mark.parametrize("depth", [0.0, 0.37, 1.0])
def test_passkey_prompt(length: int, depth: float) -> None:
    prompt = passkey.passkey_prompt(HAYSTACK, "48213", length, depth, start=123)
    needle = "\nThe pass key is 48213. Remember it.\n"
    room = length - len(needle) - len(passkey.QUESTION)
    before, found, after = prompt.partition(needle)
    assert found
    assert len(prompt.encode()) == length
    assert len(before) == round(depth * room)
    assert before + after.removesuffix(passkey.QUESTION) == HAYSTACK[123 : 123 + room]
    assert prompt.endswith("\nWhat is the pass key? The pass key is ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"key": "1234"}, "key must be 5 digits"),
        ({"depth": 1.5}, r"depth must lie in \[0, 1\]"),
        ({"length": 75}, "length must be at least 76"),
        ({"length": len(HAYSTACK) + 100}, "ASCII characters of haystack"),
        ({"haystack": "é" * 1000}, "ASCII characters of haystack"),
    ],
    ids=["key", "depth", "length", "short haystack", "haystack not ASCII"],
)
def test_passkey_prompt_refuses(arguments: dict[str, object], message: str) -> None:
    correct = {"haystack": HAYSTACK, "key": "48213", "length": 512, "depth": 0.5}
    with pytest.raises(ValueError, match=message):
        passkey.passkey_prompt(**(correct | arguments))


def test_passkey_tasks() -> None:
    tasks = passkey.passkey_tasks(HAYSTACK, [512, 700], [0.0, 0.5, 1.0], trials=2, seed=3)
    assert [task.length for task in tasks] == [512] * 6 + [700] * 6
    assert all(len(task.prompt) == task.length and task.key in task.prompt for task in tasks)
    assert len({task.key for task in tasks}) == 12
    assert tasks == passkey.passkey_tasks(HAYSTACK, [512, 700], [0.0, 0.5, 1.0], trials=2, seed=3)
    assert tasks != passkey.passkey_tasks(HAYSTACK, [512, 700], [0.0, 0.5, 1.0], trials=2, seed=4)


@pytest.mark.parametrize(
    ("answer", "expected"), [("48213", True), (" 48213.", True), ("48214", False), ("is 48213", False), ("", False)]
)
def test_is_answered_by(answer: str, expected: bool) -> None:
    task = passkey.PasskeyTask("48213", 512, 0.5, "prompt")
    assert task.is_answered_by(answer) is expected


def test_texts() -> None:
    for name in ("haystack", "calibration"):
        text = (EXAMPLES / "texts" / f"{name}.txt").read_bytes()
        assert text.isascii()
        assert len(text) > 100_000


def test_tokenizer_is_byte_level() -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(EXAMPLES / "passkey-mamba2-4m" / "tokenizer.json"))
    prompt = passkey.passkey_prompt(HAYSTACK, "48213", 512, 0.5)
    assert tokenizer.encode(prompt, add_special_tokens=False).ids == list(prompt.encode())


@pytest.mark.parametrize("script", ["demo", "offline", "serve_client"])
def test_help(script: str) -> None:
    shown = subprocess.run(
        [sys.executable, EXAMPLES / f"{script}.py", "--help"], capture_output=True, text=True, timeout=60, check=False
    )
    assert shown.returncode == 0, shown.stderr
    assert "usage:" in shown.stdout


def test_server_that_fails_shows_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for `vllm`, which takes long to say the same."""
    serving = load_example("serving")
    (tmp_path / "vllm").write_text('#!/bin/sh\necho "no such option: $4" >&2\nexit 2\n')
    (tmp_path / "vllm").chmod(0o755)
    monkeypatch.setattr(serving.sysconfig, "get_path", lambda name: str(tmp_path))
    with (
        pytest.raises(serving.ServerError, match=r"the server ended with exit code 2(.|\n)*no such option: --wrong"),
        serving.running_server("model", ["further", "--wrong"], tmp_path / "log"),
    ):
        pytest.fail("the server must not start")
