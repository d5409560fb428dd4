"""Device, versions, command and date of a run."""

import platform
import sys
from datetime import UTC, datetime
from typing import Any


def environment() -> dict[str, Any]:
    """What a result file says about its run."""
    from importlib.metadata import version

    import torch
    import vllm

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU"
    packages = {"vllm": vllm.__version__, "torch": torch.__version__, "triton": version("triton")}
    return {
        "device": device,
        "driver": _driver(),
        "versions": {"python": platform.python_version(), **packages},
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(UTC).date().isoformat(),
    }


def environment_line(where: dict[str, Any]) -> str:
    """What `environment` found, as a sentence for a report."""
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    return f"{where['device']}, driver {where['driver']}, {versions}; {where['date']}; `{where['command']}`."


def _driver() -> str:
    import subprocess

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.CalledProcessError):
        return "none"
