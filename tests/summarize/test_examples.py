"""The examples of the job: that each starts, and that `vllm run-batch` answers a batch file."""

import subprocess
import sys
from pathlib import Path

import pytest
from example_modules import EXAMPLES
from test_server import server_environment


@pytest.mark.parametrize("script", ["batch_files", "ray_summarize", "summarize_server"])
def test_help(script: str) -> None:
    shown = subprocess.run(
        [sys.executable, EXAMPLES / f"{script}.py", "--help"], capture_output=True, text=True, timeout=60, check=False
    )
    assert shown.returncode == 0, shown.stderr
    assert "usage:" in shown.stdout


@pytest.mark.slow
@pytest.mark.engine
def test_batch_files(tmp_path: Path) -> None:
    """Through the real command, with the chat template of the package."""
    ran = subprocess.run(
        [sys.executable, EXAMPLES / "batch_files.py", "--out", tmp_path / "batch"],
        cwd=EXAMPLES.parent,
        env=server_environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    lines = [line.split(", ") for line in ran.stdout.splitlines() if " bytes, key " in line]
    assert len(lines) == 6
    found = sum(line[1].split()[1] in line[1].partition(": ")[2] for line in lines)
    assert found >= 4
