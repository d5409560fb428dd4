"""Seconds of a calibration at the start, the paper's and closed-loop, up to long prompts; dummy weights.

    python benchmarks/closed_loop_time.py [--models NAME ...] [--longest 192000] [--out FILE]

Each start is a process of its own, whose log tells the seconds. The closed loop runs each of its five sequences of each
length in one step, so that steps of --longest tokens must fit into memory. `--tiny` tries the script out on a CPU.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from calibration_time import MODELS, START, TRAIN_LENGTHS, _environment, _write_model

CALIBRATED = re.compile(r"LongMamba: calibrated in ([0-9.]+) s")
METHODS = ("paper", "closed-loop")


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["mamba-1.4b", "mamba2-1.3b"])
    parser.add_argument("--longest", type=int, default=192_000, help="longest prompt in tokens [%(default)s]")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to try the script out on a CPU")
    parser.add_argument("--out", type=Path, help="JSON file")
    given = parser.parse_args()
    document: dict[str, Any] = {"environment": _environment(), "longest": given.longest, "tiny": given.tiny}
    document["seconds"] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in given.models:
            model = _write_model(name, Path(folder) / name, given.tiny)
            seconds = {method: _start(name, model, method, given) for method in METHODS}
            document["seconds"][name] = seconds
            print(name, seconds, flush=True)
            if given.out:
                given.out.write_text(json.dumps(document, indent=1) + "\n")


def _start(name: str, model: Path, method: str, given: argparse.Namespace) -> float:
    options = {"train_length": 256 if given.tiny else TRAIN_LENGTHS[name], "calibration_method": method}
    arguments = {
        "model": str(model),
        "load_format": "dummy",
        "max_model_len": given.longest + 2,
        "max_num_batched_tokens": given.longest + 1,
        "max_num_seqs": 4,
        "enable_prefix_caching": False,
        "enforce_eager": True,
        "gpu_memory_utilization": 0.1 if given.tiny else 0.6,
        "dtype": "float32" if given.tiny else "bfloat16",
        "model_impl": "longmamba",
        "additional_config": {"longmamba": options},
    }
    script = model.parent / "start.py"
    script.write_text(START)
    environment = os.environ | {"VLLM_LOGGING_LEVEL": "INFO", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(script), json.dumps(arguments)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    output = result.stdout + result.stderr
    calibrated = CALIBRATED.search(output)
    if result.returncode != 0 or calibrated is None:
        raise SystemExit(f"{name}, {method}: the engine did not start or calibrate:\n{output[-6000:]}")
    return float(calibrated[1])


if __name__ == "__main__":
    main()
