"""Jamba as a classifier: the filter acts on its prompts as on those of the language model."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from references.reference_lm import reference_logprobs
from safetensors.torch import load_file, save_file
from tiny_models import random_token_ids

from vllm_longmamba.checkpoint.fingerprint import weights_fingerprint
from vllm_longmamba.tables import ThresholdTable, save_table

from .conftest import longmamba
from .harness import assert_agrees, make_table

pytestmark = pytest.mark.engine

TOKENS = [7, 90]


def write_classifier(language_model: Path, folder: Path) -> Path:
    """A classifier whose scores are the logits of two tokens."""
    shutil.copytree(language_model, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["JambaForSequenceClassification"], "num_labels": len(TOKENS)}
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    weights["score.weight"] = weights.pop("lm_head.weight")[TOKENS].contiguous()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_classification(engine: Callable[..., Any], tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    language_model = tiny_model("jamba")
    model = write_classifier(language_model, tmp_path / "model")
    table = make_table(language_model)
    # Made for these weights: theirs have other names.
    metadata = replace(table.metadata, weights_fingerprint=weights_fingerprint([str(model / "model.safetensors")]))
    save_table(ThresholdTable(metadata, table.row_lengths, table.layers), tmp_path / "table.safetensors")
    running = engine(model, **longmamba(tmp_path / "table.safetensors"), runner="pooling", max_num_batched_tokens=64)
    prompts = [random_token_ids(length, seed=length) for length in (65, 300, 500)]
    outputs = running.llm.classify([{"prompt_token_ids": prompt} for prompt in prompts], use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        row = table.row_of(len(prompt))
        filters = {layer: table.thresholds(layer)[row] for layer in table.layers}

        def expected(filters: Any, prompt: list[int] = prompt) -> np.ndarray:
            last = reference_logprobs(language_model, prompt, prompt_length=len(prompt), filters=filters)[-1].numpy()
            return (last[TOKENS[0]] - last[TOKENS[1]]).reshape(1)

        first, second = np.log(output.outputs.probs)
        assert_agrees(np.array([first - second]), expected, filters)
