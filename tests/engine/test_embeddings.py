"""A language model as an embedder: the filter acts on its prompts, and the embedding is the filtered model's."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from references.reference_lm import reference_logprobs
from safetensors.torch import load_file
from tiny_models import random_token_ids

from .conftest import A_HYBRID, longmamba
from .harness import Filters, assert_agrees, filters_of, weight_files

pytestmark = pytest.mark.engine

SLOW = pytest.mark.slow
FAMILIES = ["mamba1", pytest.param("mamba2", marks=SLOW), pytest.param("zamba2", marks=SLOW), A_HYBRID]


def tied_head(model: Path) -> torch.Tensor:
    """(vocabulary, d_model) of a model whose head is its embedding."""
    (file,) = weight_files(model)
    weights = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
    (embedding,) = (weight for name, weight in weights.items() if name.endswith(("embedding.weight", "tokens.weight")))
    return embedding.double()  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", FAMILIES)
def test_embedding(
    family: str, engine: Callable[..., Any], tiny_model: Callable[[str], Path], tiny_table: Callable[[str], Any]
) -> None:
    path, table = tiny_table(family)
    # The head's input as it is: with an activation, vLLM would give it unit length.
    pooling = {"runner": "pooling", "convert": "embed", "pooler_config": {"use_activation": False}}
    pooling["skip_tokenizer_init"] = False
    running = engine(family, **longmamba(path), **pooling, max_num_batched_tokens=64)
    head = tied_head(tiny_model(family))
    prompts = [random_token_ids(length, seed=length) for length in (64, 65, 300, 500)]
    outputs = running.llm.embed([{"prompt_token_ids": prompt} for prompt in prompts], use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        logits = head @ torch.tensor(output.outputs.embedding, dtype=torch.float64)

        def expected(filters: Filters, prompt: list[int] = prompt) -> np.ndarray:
            return reference_logprobs(
                tiny_model(family), prompt, prompt_length=len(prompt), filters=filters
            )[-1].numpy()  # fmt: skip

        assert_agrees(logits.log_softmax(-1).numpy(), expected, filters_of(table, len(prompt)))
