"""Jobs with a real engine and the example model: the command as a user runs it."""

import signal
import subprocess
from pathlib import Path

import pytest

from vllm_longmamba.summarize.engine import kept_full

from .real_jobs import QUESTION, START_SECONDS, command, rows_of, start_and_signal, user_environment, wait_until_gone

pytestmark = pytest.mark.engine


@pytest.mark.parametrize(("running", "requests"), [(1, 2), (8, 16), (16, 32), (64, 80), (256, 282)])
def test_kept_full(running: int, requests: int) -> None:
    """Small engines have as many requests waiting as they run, large ones a tenth."""
    assert kept_full(running) == requests


# That a traceback is shown on request, test_engine_errors.py tests in every run, without an engine.
@pytest.mark.parametrize("verbose", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_engine_that_does_not_start(tmp_path: Path, verbose: bool) -> None:
    """One line with the cause and the remedy, from a process of the engine's own; its traceback on request."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("text")
    ran = subprocess.run(
        command(tmp_path, *(["--verbose"] if verbose else [])),
        env=user_environment(tmp_path) | {"VLLM_CPU_KVCACHE_SPACE": "100000"},
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
        check=False,
    )
    assert ran.returncode == 1
    (line,) = [line for line in ran.stderr.splitlines() if line.startswith("longmamba summarize: ")]
    assert "is less than requested memory for kv" in line
    assert line.endswith("Set VLLM_CPU_KVCACHE_SPACE to fewer GiB than are free.")
    assert ("Traceback" in ran.stderr) == verbose
    assert "Traceback" not in ran.stdout
    wait_until_gone(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_signal_and_resume(number: signal.Signals, tmp_path: Path, documents: dict[str, str]) -> None:
    """Ctrl-C, which reaches the engine's processes too, finishes what runs; kill -9 leaves no process behind."""
    asked = ["--instruction", QUESTION, "--max-tokens", "5", "--fit", "map-reduce", "--concurrency", "2"]
    output = tmp_path / "out.jsonl"
    job = start_and_signal(command(tmp_path, *asked), output, number)
    assert job.wait(180) == (130 if number == signal.SIGINT else -signal.SIGKILL)
    wait_until_gone(tmp_path)
    first = rows_of(output)
    assert 1 <= len(first) < len(documents)
    assert all(row["error"] is None and row["finish_reason"] == "length" for row in first.values())
    subprocess.run(command(tmp_path, *asked), timeout=START_SECONDS, env=user_environment(tmp_path), check=True)
    rows = rows_of(output)
    assert rows.keys() == documents.keys() | {"long"}
    assert all(rows[name] == first[name] for name in first)
    found = sum(str(rows[name]["summary"]).startswith(key) for name, key in documents.items())
    assert found >= 0.75 * len(documents)
    steps = rows["long"]["steps"]
    assert isinstance(steps, list)
    assert [step["section"] for step in steps] == [1, 2, 3]
