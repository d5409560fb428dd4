"""DeciMamba through a real engine: log-probabilities against the torch reference.

Every kind of step is in tests/layers/test_decimated_models.py; here is what vLLM makes of requests.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from decimated_models import CASES
from tiny_models import random_token_ids

from .harness import LOGPROB_TOLERANCE, Completion, completion, sampling

SLOW = pytest.mark.slow
pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Function: name of a case -> folder of its checkpoint."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = CASES[name].write(tmp_path_factory.mktemp("decimated") / name, **CASES[name].model)
        return made[name]

    return make


def check(name: str, folder: Path, prompt: list[int], result: Completion, ends: list[int] | None = None) -> None:
    expected = CASES[name].logprobs(folder, prompt, result.tokens[:-1], ends)[:, : result.logprobs.shape[1]]
    np.testing.assert_allclose(result.logprobs, expected, rtol=0, atol=LOGPROB_TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_a_batch_of_prompts(name: str, engine: Callable[..., Any], model: Callable[[str], Path]) -> None:
    running = engine(model(name), **CASES[name].arguments)
    prompts = CASES[name].prompts()
    for prompt, result in zip(prompts, running.generate(prompts), strict=True):
        check(name, model(name), prompt, result)


def test_log_probabilities_of_dropped_tokens_are_refused(
    engine: Callable[..., Any], model: Callable[[str], Path]
) -> None:
    from vllm import SamplingParams

    running = engine(model("falcon_mamba"), **CASES["falcon_mamba"].arguments).llm
    asking = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    short, long = ({"prompt_token_ids": random_token_ids(length)} for length in (51, 52))
    (output,) = running.generate([short], asking, use_tqdm=False)
    assert len(output.prompt_logprobs) == 51
    with pytest.raises(ValueError, match="prompt_logprobs was asked for, but a prompt of 52 tokens is decimated"):
        running.generate([long], asking, use_tqdm=False)


@pytest.mark.parametrize(
    "name", [pytest.param("mamba1", marks=SLOW), pytest.param("mamba2", marks=SLOW), "falcon_mamba"]
)
def test_requests_come_and_go_and_are_preempted(
    name: str, engine: Callable[..., Any], model: Callable[[str], Path]
) -> None:
    """A resumed request is read again over prompt and generated tokens, which are all kept."""
    running = engine(model(name), **CASES[name].arguments).llm.llm_engine
    prompts = CASES[name].prompts()[2:]
    scheduler = running.engine_core.engine_core.scheduler
    finished: dict[str, Any] = {}
    preempted = 0
    for step in range(100):
        if step % 3 == 0 and step // 3 < len(prompts):
            running.add_request(str(step // 3), {"prompt_token_ids": prompts[step // 3]}, sampling(24))
        if step in (8, 17):
            assert running.reset_prefix_cache(reset_running_requests=True)
            preempted += sum(request.num_preemptions > 0 for request in scheduler.requests.values())
        finished |= {output.request_id: output for output in running.step() if output.finished}
    assert preempted > 3
    for number, prompt in enumerate(prompts):
        check(name, model(name), prompt, completion(finished[str(number)]))


@pytest.mark.parametrize(
    "name", [pytest.param("mamba1", marks=SLOW), "mamba2", pytest.param("falcon_mamba", marks=SLOW)]
)
def test_cut_prompts(name: str, engine: Callable[..., Any], model: Callable[[str], Path]) -> None:
    """Alone in the engine, a prompt is cut every 64 tokens."""
    settings = CASES[name].settings | {"cut_prompts": True}
    arguments = CASES[name].arguments | {"additional_config": {"decimamba": settings}, "max_num_batched_tokens": 64}
    running = engine(model(name), **arguments)
    for prompt in CASES[name].prompts()[3:]:
        [result] = running.generate([prompt])
        check(name, model(name), prompt, result, [*range(64, len(prompt), 64), len(prompt)])


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_cuda_graphs(name: str, engine: Callable[..., Any], model: Callable[[str], Path]) -> None:
    """Decode steps replay graphs; compiled, the layers that drop tokens are one custom op each."""
    running = engine(model(name), **CASES[name].arguments, enforce_eager=False)
    prompts = CASES[name].prompts()
    for batch in (prompts[3:], prompts, prompts[5:6]):
        for prompt, result in zip(batch, running.generate(batch, max_tokens=12), strict=True):
            check(name, model(name), prompt, result)


@pytest.mark.parametrize("name", ["mamba1", pytest.param("mamba2", marks=SLOW)])
def test_tensor_parallel(
    name: str, engine: Callable[..., Any], model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rank has its own channels, and all choose the same tokens."""
    places = torch.cuda.device_count() if torch.cuda.is_available() else (os.cpu_count() or 1)
    if places < 2:
        pytest.skip("needs two GPUs or two CPU cores")
    # Without this, vLLM wants a NUMA node for each rank.
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    running = engine(model(name), **CASES[name].arguments, tensor_parallel_size=2)
    prompts = CASES[name].prompts()[3:]
    for prompt, result in zip(prompts, running.generate(prompts), strict=True):
        check(name, model(name), prompt, result)
