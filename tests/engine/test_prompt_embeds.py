"""Prompts that come as embeddings are filtered by their number, as prompts of tokens are."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import random_token_ids

from .conftest import A_HYBRID, longmamba
from .harness import assert_exact, completion, sampling

pytestmark = pytest.mark.engine

SLOW = pytest.mark.slow
FAMILIES = ["mamba1", pytest.param("mamba2", marks=SLOW), pytest.param("zamba2", marks=SLOW), A_HYBRID]


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings(
    family: str, engine: Callable[..., Any], tiny_model: Callable[[str], Path], tiny_table: Callable[[str], Any]
) -> None:
    path, table = tiny_table(family)
    running = engine(family, **longmamba(path), enable_prompt_embeds=True, max_num_batched_tokens=64)
    prompts = [random_token_ids(length, seed=length) for length in (64, 333)]

    def embed(worker: Any, tokens: list[int]) -> torch.Tensor:
        model = worker.get_model()
        ids = torch.tensor(tokens, device=next(model.parameters()).device)
        embedded: torch.Tensor = model.embed_input_ids(ids)
        return embedded.detach().cpu()

    embeddings = [running.llm.collective_rpc(embed, args=(prompt,))[0] for prompt in prompts]
    inputs = [{"prompt_embeds": embedded} for embedded in embeddings]
    for prompt, output in zip(prompts, running.llm.generate(inputs, sampling(6), use_tqdm=False), strict=True):
        assert_exact(tiny_model(family), prompt, completion(output), table)
