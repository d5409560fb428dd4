"""The records of the small models in examples/, and what the results page calls these."""

import json
from pathlib import Path
from typing import Any

# Folder of the records and of the example, and what the page calls the model.
MODELS = {
    "reference-mamba1-4m": "Mamba-1, 3.7M",
    "passkey-mamba2-4m": "Mamba-2, 3.8M",
    "reference-mamba2-few-writes-4m": "Mamba-2 (few writes), 3.8M",
    "reference-zamba2-1m": "Zamba2, 1.1M",
}


def report(results: Path, model: str, task: str) -> dict[str, Any]:
    """The record of a model and a task; empty where there is none."""
    file = results / model / task / "report.json"
    return json.loads(file.read_text()) if file.exists() else {}


def of_models(results: Path, task: str) -> dict[str, dict[str, Any]]:
    """Model -> record of a task, of the models that have one."""
    return {model: found for model in MODELS if (found := report(results, model, task))}
