"""Jobs with a real engine and the example model: the command as a user runs it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from example_modules import load_example

from .conftest import EXAMPLE_MODEL
from .documents import write_jsonl

pytestmark = pytest.mark.engine

passkey = load_example("passkey")
QUESTION = "What is the pass key? The pass key is "
START_SECONDS = 240
ENGINE = {"max_num_seqs": 8, "enforce_eager": True}


def command(folder: Path, *more: str, output: str = "out.jsonl") -> list[str]:
    """`longmamba summarize` over the folder's inputs."""
    script = str(Path(sys.executable).with_name("longmamba"))
    start = [script, "summarize", str(folder / "in"), "-o", str(folder / output)]
    model = ["--model", str(EXAMPLE_MODEL), "--dtype", "float32", "--max-model-len", "4096"]
    return [*start, *model, "--engine-args", json.dumps(ENGINE), *more]


@pytest.fixture
def environment() -> dict[str, str]:
    """As users have it: the engine in a process of its own."""
    environment = dict(os.environ)
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    return environment


@pytest.fixture
def documents(tmp_path: Path) -> dict[str, str]:
    """Keys of documents that hide a pass key; one document is longer than the model takes."""
    tasks = passkey.passkey_tasks(passkey.read_haystack(), [500, 1500], [0.5], trials=12, seed=1)
    rows = [
        {"id": str(number), "text": task.prompt.removesuffix(passkey.QUESTION)} for number, task in enumerate(tasks)
    ]
    write_jsonl(tmp_path / "in" / "rows.jsonl", [*rows, {"id": "long", "text": passkey.read_haystack()[:9000]}])
    return {str(number): task.key for number, task in enumerate(tasks)}


def rows_of(path: Path) -> dict[str, dict[str, object]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row for row in rows}


def test_interrupt_kill_resume(tmp_path: Path, documents: dict[str, str], environment: dict[str, str]) -> None:
    """Ctrl-C, which reaches the engine's processes too, finishes what runs; kill -9 leaves no process behind."""
    asked = ["--instruction", QUESTION, "--max-tokens", "5", "--fit", "map-reduce", "--concurrency", "2"]
    output = tmp_path / "out.jsonl"
    interrupted = start_and_signal(command(tmp_path, *asked), output, environment, signal.SIGINT)
    assert interrupted.wait(60) == 130
    first = rows_of(output)
    assert 1 <= len(first) < len(documents)
    assert all(row["error"] is None and row["finish_reason"] == "length" for row in first.values())
    killed = start_and_signal(command(tmp_path, *asked), output, environment, signal.SIGKILL, after=len(first))
    assert killed.wait(60) == -signal.SIGKILL
    deadline = time.monotonic() + 30
    while left := engine_processes(tmp_path):
        assert time.monotonic() < deadline, left
        time.sleep(0.2)
    subprocess.run(command(tmp_path, *asked), timeout=START_SECONDS, env=environment, check=True)
    rows = rows_of(output)
    assert rows.keys() == documents.keys() | {"long"}
    assert all(rows[name] == first[name] for name in first)
    found = sum(str(rows[name]["summary"]).startswith(key) for name, key in documents.items())
    assert found >= 0.75 * len(documents)
    steps = rows["long"]["steps"]
    assert isinstance(steps, list)
    assert [step["section"] for step in steps] == [1, 2, 3]


def start_and_signal(
    arguments: list[str], output: Path, environment: dict[str, str], number: signal.Signals, after: int = 0
) -> subprocess.Popen[bytes]:
    """Start a job, and signal it, and its group as a terminal does with ctrl-C, once it has written a row."""
    environment = environment | {"LONGMAMBA_TEST_FOLDER": str(output.parent)}
    job = subprocess.Popen(arguments, env=environment, start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + START_SECONDS
    while not output.exists() or output.read_bytes().count(b"\n") <= after:
        assert job.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    if number == signal.SIGINT:
        os.killpg(job.pid, number)
    else:
        job.send_signal(number)
    return job


def engine_processes(folder: Path) -> list[str]:
    """Processes that were started for the jobs of a folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("LONGMAMBA_TEST_FOLDER") == str(folder):
                found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return found
