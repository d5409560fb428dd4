"""LoRA adapters of the hybrids that vLLM takes them for: the merged model, filtered by the table of the base model."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import random_token_ids, write_jamba

from .conftest import longmamba
from .harness import assert_exact, completion, sampling, write_table

pytestmark = pytest.mark.engine

RANK = 8
# The first gives the raw dt of Mamba-2, and all that decides on it in Mamba-1.
ADAPTED = ("in_proj", "out_proj", "q_proj")


def write_adapter(model: Path, folder: Path) -> tuple[Path, Path]:
    """Writes a random adapter, as PEFT stores it, and the model with the adapter merged into its weights."""
    adapter, merged = folder / "adapter", folder / "merged"
    shutil.copytree(model, merged)
    adapter.mkdir()
    weights, low_rank = load_file(model / "model.safetensors"), {}
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in weights if name.removesuffix(".weight").endswith(ADAPTED)]:
        rows, columns = weights[name].shape
        A = torch.randn(RANK, columns, generator=generator) * columns**-0.5
        B = torch.randn(rows, RANK, generator=generator) * 0.3 * RANK**-0.5
        module = f"base_model.model.{name.removesuffix('.weight')}"
        low_rank |= {f"{module}.lora_A.weight": A, f"{module}.lora_B.weight": B}
        weights[name] += B @ A
    assert {name.split(".")[-3] for name in low_rank} == set(ADAPTED)
    save_file(low_rank, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": list(ADAPTED), "bias": "none"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    save_file(weights, merged / "model.safetensors", metadata={"format": "pt"})
    return adapter, merged


# Granite's layers are Mamba-2 and attention, as Nemotron-H's are.
@pytest.mark.parametrize(
    "family", ["jamba", pytest.param("granite_hybrid", marks=pytest.mark.slow), "falcon_h1", "nemotron_h"]
)
def test_adapter(family: str, engine: Callable[..., Any], tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    from vllm.lora.request import LoRARequest

    # vLLM runs adapted experts on a GPU only.
    model = tiny_model(family) if family != "jamba" else write_jamba(tmp_path / "jamba", experts=1)
    table = write_table(model, tmp_path / "table.safetensors")
    adapter, merged = write_adapter(model, tmp_path)
    options = longmamba(tmp_path / "table.safetensors")
    # Of Mamba-1, x_proj reads a part of a step, but a wrapped layer takes what it reads for a whole one.
    lora = {"enable_lora": True, "max_lora_rank": RANK, "lora_target_modules": list(ADAPTED)}
    running = engine(model, **options, **lora, max_num_batched_tokens=64)
    prompts = [random_token_ids(length, seed=length) for length in (64, 193, 300)]
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    # Not in one batch: on a CPU, vLLM would adapt the requests without an adapter, too.
    for expected, request in ((merged, LoRARequest("adapter", 1, str(adapter))), (model, None)):
        outputs = running.llm.generate(inputs, sampling(6), lora_request=request, use_tqdm=False)
        for prompt, output in zip(prompts, outputs, strict=True):
            assert_exact(expected, prompt, completion(output), table)
