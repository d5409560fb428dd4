"""A kernel that was launched before starts without Triton's preparation, and with just what Triton would hand over."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scan_inputs import RUNS_TRITON

from vllm_longmamba.kernels.launch import launch

pytest.importorskip("triton")


@pytest.mark.skipif(RUNS_TRITON, reason="once is enough")
def test_without_a_gpu() -> None:
    """In a process of its own: Triton has one driver a process, and its kernels may be the interpreter's here."""
    here = Path(__file__).resolve().parent
    paths = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "TRITON_INTERPRET": "0"}
    command = [sys.executable, str(here / "launches_without_gpu.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("keys") == 9, done.stdout
    assert done.stdout.count("kernels kept") == 2, done.stdout


class Kernel:
    """Of Triton's interpreter, which compiles nothing."""

    def __init__(self) -> None:
        self.launched: list[tuple[int, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> object:
        return lambda *arguments, **constants: self.launched.append(grid)


def test_an_interpreter_launches_each_time() -> None:
    kernel, x = Kernel(), torch.zeros(4)
    for size in (1, 2):
        launch(kernel, (size,), x)(x, BLOCK=4)
    assert kernel.launched == [(1,), (2,)]
