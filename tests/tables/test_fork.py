"""vLLM forks its engine core from the process that has loaded the table; the core loads it again."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from vllm_longmamba.tables import LayerThresholds, TableMetadata, ThresholdTable, save_table

_LOAD_FORK_LOAD = """
import os, signal, sys, torch
from vllm_longmamba.tables import load_table
torch.set_num_threads(2)
def use():
    table = load_table(sys.argv[1])
    return [table.thresholds(layer) for layer in table.layers]
use()
child = os.fork()
if child == 0:
    signal.alarm(50)  # a child that hangs must not outlive the test
    use()
    os._exit(0)
sys.exit(os.waitpid(child, 0)[1])
"""


def test_a_table_loads_in_a_fork_of_a_process_that_loaded_it(tmp_path: Path) -> None:
    # As many values in a layer as in mamba-1.4b: enough for torch to start threads.
    rows, channels = 130, 4096
    layer = LayerThresholds(
        retention=torch.full((channels,), 0.5, dtype=torch.float64),
        dt_threshold=torch.cat([torch.full((1, channels), -1.0), torch.rand(rows - 1, channels)]),
    )
    metadata = TableMetadata(
        model_id="test",
        weights_fingerprint="0" * 64,
        train_length=1000,
        corpus="none",
        clamp_percent=5.0,
        min_retention=1e-2,
        num_sequences=1,
        seed=0,
        tool_version="test",
    )
    lengths = np.arange(1, rows + 1) * 1000
    save_table(ThresholdTable(metadata=metadata, row_lengths=lengths, layers={0: layer}), tmp_path / "table")
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-c", _LOAD_FORK_LOAD, str(tmp_path / "table")]
    subprocess.run(command, env=environment, timeout=60, check=True)
