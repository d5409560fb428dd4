"""Jobs as a user runs them: the command with a real engine and the example model, and signals to it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from .conftest import EXAMPLE_MODEL
from .documents import stored_rows

QUESTION = "What is the pass key? The pass key is "
START_SECONDS = 240
ENGINE = {"max_num_seqs": 8, "enforce_eager": True}
_FOLDER = "LONGMAMBA_TEST_FOLDER"


def command(folder: Path, *more: str, output: str = "out.jsonl") -> list[str]:
    """`longmamba summarize` over the folder's inputs."""
    script = str(Path(sys.executable).with_name("longmamba"))
    start = [script, "summarize", str(folder / "in"), "-o", str(folder / output)]
    model = ["--model", str(EXAMPLE_MODEL), "--dtype", "float32", "--max-model-len", "4096"]
    return [*start, *model, "--engine-args", json.dumps(ENGINE), *more]


def user_environment(folder: Path) -> dict[str, str]:
    """As users have it, the engine in a process of its own; marks what is started for a folder."""
    environment = dict(os.environ) | {_FOLDER: str(folder)}
    # The engines and Ray's workers give themselves names, and would overwrite their environment with them.
    environment["SPT_NOENV"] = "1"
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    return environment


def rows_of(path: Path) -> dict[str, dict[str, object]]:
    """Rows by id in the store beside an output; no id may come twice."""
    rows = stored_rows(path)
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row for row in rows}


def start_and_signal(
    arguments: list[str], output: Path, number: signal.Signals, after: int = 0, seconds: float = START_SECONDS
) -> subprocess.Popen[bytes]:
    """Start a job, and signal it, and its group as a terminal does with ctrl-C, once it has written a row more."""
    job = subprocess.Popen(
        arguments, env=user_environment(output.parent), start_new_session=True, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + seconds
    while len(stored_rows(output)) <= after:
        assert job.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    # Otherwise `wait_until_gone` would see nothing of them either.
    assert any("EngineCore" in name for name in processes(output.parent))
    if number == signal.SIGINT:
        os.killpg(job.pid, number)
    else:
        job.send_signal(number)
    return job


def processes(folder: Path) -> list[str]:
    """Processes that were started for the jobs of a folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(_FOLDER) == str(folder):
                found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return found


def wait_until_gone(folder: Path, seconds: float = 30.0) -> None:
    """Wait until nothing is left of a job that was killed."""
    deadline = time.monotonic() + seconds
    while left := processes(folder):
        assert time.monotonic() < deadline, left
        time.sleep(0.2)
