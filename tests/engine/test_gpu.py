"""What only a GPU shows: CUDA graphs, stock Mamba-1, large offsets. The rest of this folder runs there as well.

Set TRITON_F32_DEFAULT=ieee: vLLM's Mamba-2 kernels multiply float32 as tf32 by default, to about 1e-3.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import random_token_ids, write_hf_twin

from vllm_longmamba.kernels import selective_scan

from .conftest import longmamba
from .harness import assert_exact

pytestmark = [pytest.mark.gpu, pytest.mark.engine]

FAMILIES = ["mamba1", "mamba2", "zamba2"]


@pytest.mark.parametrize("family", [*FAMILIES, "granite_hybrid"])
@pytest.mark.parametrize("filters_generated", [False, True])
def test_cuda_graphs(
    family: str,
    filters_generated: bool,
    engine: Callable[..., Any],
    tiny_model: Callable[[str], Path],
    tiny_table: Callable[[str], Any],
) -> None:
    path, table = tiny_table(family)
    options = longmamba(path, filter_generated=filters_generated)
    running = engine(family, **options, enforce_eager=False, max_num_batched_tokens=64)
    rng = random.Random(family)
    # Last chunks of one token replay the decode graph; beside other requests and alone.
    for lengths in ([65, 129, 193, 257], [193], [rng.randrange(2, 500) for _ in range(12)]):
        prompts = [random_token_ids(length, seed=rng.randrange(10**6)) for length in lengths]
        for prompt, result in zip(prompts, running.generate(prompts, max_tokens=12), strict=True):
            assert_exact(tiny_model(family), prompt, result, table, filters_generated)


@pytest.mark.parametrize("family", FAMILIES)
def test_filter_off_gives_the_tokens_of_stock_vllm_on_a_gpu(
    family: str, engine: Callable[..., Any], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tiny_model(family) if family == "zamba2" else write_hf_twin(tiny_model(family), tmp_path / "twin")
    prompts = [random_token_ids(length, seed=length) for length in (5, 64, 300)]
    # vLLM's default state type is the model's, here float32 as well.
    stock = engine(folder).generate(prompts)
    plain = engine(folder, **longmamba()).generate(prompts)
    for expected, result in zip(stock, plain, strict=True):
        assert result.tokens == expected.tokens
        assert abs(result.logprobs - expected.logprobs).max() < 1e-3


def test_offsets_beyond_32_bits() -> None:
    d_inner, d_state, tokens = 8192, 16, 2**31 // 8192 + 300
    generator = torch.Generator("cuda").manual_seed(0)

    def random_tensor(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    x, dt = random_tensor(tokens, d_inner), random_tensor(tokens, d_inner)
    B, C = random_tensor(tokens, d_state), random_tensor(tokens, d_state)
    A = -torch.rand(d_inner, d_state, generator=generator, device="cuda") - 0.5
    D, bias = torch.ones(d_inner, device="cuda"), torch.zeros(d_inner, device="cuda")

    def scan(start: int) -> torch.Tensor:
        length = tokens - start
        return selective_scan(
            x[start:],
            dt[start:],
            A,
            B[start:],
            C[start:],
            D,
            None,
            bias,
            torch.zeros(2, d_inner, d_state, device="cuda"),
            torch.tensor([0, length], device="cuda", dtype=torch.int32),
            torch.ones(1, device="cuda", dtype=torch.int32),
            torch.zeros(1, device="cuda", dtype=torch.bool),
        )

    # With |A| dt of at least 0.3 a token, what lies 200 tokens back is forgotten.
    whole, tail = scan(0)[-50:].float(), scan(tokens - 400)[-50:].float()
    assert (whole - tail).norm() < 1e-2 * tail.norm()
