"""Projections of 8 bits as compressed-tensors stores them: dt of the rounded weights meets their thresholds."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from references.reference_lm import reference_logprobs
from safetensors.torch import load_file, save_file
from tiny_models import random_token_ids, write_hf_twin

from vllm_longmamba.checkpoint.fingerprint import weights_fingerprint
from vllm_longmamba.layers.filtered_mixer import filtered_mixers
from vllm_longmamba.tables import ThresholdTable, save_table

from .conftest import A_HYBRID, longmamba
from .harness import filters_of, make_table

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU, vLLM multiplies 8 bits in half precision only"),
]

PROJECTIONS = ("in_proj.weight", "out_proj.weight")
WEIGHTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
INPUTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
QUANTIZATION = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "config_groups": {
        "projections": {
            "targets": [r"re:.*\.in_proj$", r"re:.*\.out_proj$"],
            "weights": WEIGHTS,
            "input_activations": INPUTS,
        }
    },
}


def write_rounded(model: Path, folder: Path) -> tuple[Path, Path]:
    """Writes a model with projections of 8 bits, and the same numbers in float32."""
    quantized, rounded = folder / "quantized", folder / "rounded"
    in_codes = load_file(model / "model.safetensors")
    in_floats = dict(in_codes)
    names = [name for name in in_codes if name.endswith(PROJECTIONS)]
    assert names
    for name in names:
        scale = in_codes[name].abs().amax(1, keepdim=True) / 127
        in_codes[name] = (in_codes[name] / scale).round().to(torch.int8)
        in_codes[f"{name}_scale"] = scale
        in_floats[name] = in_codes[name] * scale
    config = json.loads((model / "config.json").read_text())
    for path, weights, changes in (
        (quantized, in_codes, {"quantization_config": QUANTIZATION}),
        (rounded, in_floats, {}),
    ):
        shutil.copytree(model, path)
        (path / "config.json").write_text(json.dumps(config | changes))
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return quantized, rounded


def quantizations(model: Any) -> set[str]:
    """How the projections of a model's mixers multiply."""
    mixers: list[Any] = filtered_mixers(model)
    return {type(layer.quant_method).__name__ for mixer in mixers for layer in (mixer.in_proj, mixer.out_proj)}


@pytest.mark.parametrize("family", ["mamba2", pytest.param("zamba2", marks=pytest.mark.slow), A_HYBRID])
def test_projections_of_8_bits(
    family: str, engine: Callable[..., Any], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model = write_hf_twin(tiny_model(family), tmp_path / "twin") if family == "mamba2" else tiny_model(family)
    quantized, rounded = write_rounded(model, tmp_path)
    table = make_table(rounded)
    metadata = replace(table.metadata, weights_fingerprint=weights_fingerprint([str(quantized / "model.safetensors")]))
    save_table(ThresholdTable(metadata, table.row_lengths, table.layers), tmp_path / "table.safetensors")
    running = engine(quantized, **longmamba(tmp_path / "table.safetensors"), max_num_batched_tokens=64)
    assert running.llm.apply_model(quantizations) == [{"CompressedTensorsLinearMethod"}]
    prompts = [random_token_ids(length, seed=length) for length in (300, 500, 700)]
    results = running.generate(prompts)

    def distance(*, filters: bool) -> float:
        """Mean difference of a log-probability from those of a float64 reference of the rounded weights."""
        differences = []
        for prompt, result in zip(prompts, results, strict=True):
            by_filters = filters_of(table, len(prompt)) if filters else {}
            tokens = prompt + result.tokens
            expected = reference_logprobs(rounded, tokens, prompt_length=len(prompt), filters=by_filters)
            differences.append(np.abs(expected[len(prompt) - 1 : -1].numpy() - result.logprobs).mean())
        return float(np.mean(differences))

    # The inputs of the projections are rounded to 8 bits, too.
    assert distance(filters=True) < 0.5 * distance(filters=False)
