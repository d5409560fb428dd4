"""Runs this folder once more in a process of its own, with the Triton kernels in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from scan_inputs import RUNS_TRITON


@pytest.mark.skipif(RUNS_TRITON, reason="the Triton kernels are what runs already")
def test_triton_kernels_in_interpreter():
    pytest.importorskip("triton")
    # the variable has to be set before triton is imported, and would slow down every other test of this process
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(Path(__file__).parent)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
