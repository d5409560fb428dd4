"""DeciMamba through a real engine: log-probabilities against the torch reference, which shares no code with it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from tiny_models import random_token_ids

from vllm_longmamba.layers.filtered_mixer import FilteredMixer
from vllm_longmamba.torch_reference import DeciMamba, LayerPlan, LayerView, Plain, Prompt, ReadingMethod, TorchModel

from .harness import LOGPROB_TOLERANCE, Completion, completion, sampling

pytestmark = pytest.mark.engine

# Least relative distance between the scores of the last token that is kept and of the first that is dropped: float32
# moves them by some 1e-6.
LEAST_GAP = 1e-5


@dataclass(frozen=True)
class CheckedDeciMamba(DeciMamba):
    """Fails for a prompt whose choice float32 could turn over."""

    def plan(self, layer: LayerView, prompt: Prompt) -> LayerPlan:
        plan = super().plan(layer, prompt)
        if plan.kept_tokens is not None:
            scores = torch.cat([self._scores(part.dt[0]) for part in layer.projections()])[: -prompt.outputs]
            ordered = scores.sort(descending=True).values
            count = self.tokens_kept(layer.index)
            if count < len(ordered):
                gap = (ordered[count - 1] - ordered[count]) / ordered[count]
                assert gap > LEAST_GAP, f"layer {layer.index}: take another prompt, the gap is {gap:.1e}"
        return plan


@dataclass(frozen=True)
class Case:
    """A model and DeciMamba's settings for it. In layer 0 of Mamba-2, equal tokens have equal dt."""

    write: Callable[..., Path]
    settings: dict[str, Any]
    more: dict[str, Any]

    @property
    def lengths(self) -> tuple[int, ...]:
        L_base = self.settings["L_base"]
        return (1, 5, L_base, L_base + 1, L_base + 2, 3 * L_base, 451)


CASES = {
    "mamba1": Case(
        tiny_models.write_mamba1_original, {"layers": [0, 1], "L_base": 100, "beta": 0.5, "min_tokens": 3}, {}
    ),
    "mamba2": Case(
        tiny_models.write_mamba2_original,
        {"layers": [1, 2, 4], "L_base": 90, "beta": 0.6, "min_tokens": 40, "score": "norm"},
        {"n_layer": 6},
    ),
    "falcon_mamba": Case(tiny_models.write_falcon_mamba, {"layers": [1], "L_base": 50}, {}),
}


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Function: name of a case -> folder of its checkpoint."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = CASES[name].write(tmp_path_factory.mktemp("decimated") / name, **CASES[name].more)
        return made[name]

    return make


def decimamba(name: str) -> dict[str, Any]:
    return {"model_impl": "decimamba", "additional_config": {"decimamba": CASES[name].settings}}


def prompts_of(name: str) -> list[list[int]]:
    return [random_token_ids(length, seed=length) for length in CASES[name].lengths]


def assert_decimated(folder: Path, name: str, prompt: list[int], result: Completion) -> None:
    """Compare with the reference, given the same tokens."""
    settings = CASES[name].settings
    is_decimated = len(prompt) > settings["L_base"] + 1
    method: ReadingMethod = CheckedDeciMamba(**settings) if is_decimated else Plain()
    reading = TorchModel(folder, method, device="cpu").read([prompt])
    logits = [reading.logits[0], *(reading.append(torch.tensor([[token]]))[0] for token in result.tokens[:-1])]
    expected = torch.cat(logits).log_softmax(-1).numpy()
    np.testing.assert_allclose(result.logprobs, expected[:, : result.logprobs.shape[1]], rtol=0, atol=LOGPROB_TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_a_batch_of_prompts(name: str, engine: Callable[..., Any], model: Callable[[str], Path]) -> None:
    running = engine(model(name), **decimamba(name))
    config = running.llm.llm_engine.vllm_config
    assert not config.scheduler_config.enable_chunked_prefill
    assert config.scheduler_config.max_num_batched_tokens >= config.model_config.max_model_len
    prompts = prompts_of(name)
    for prompt, result in zip(prompts, running.generate(prompts), strict=True):
        assert_decimated(model(name), name, prompt, result)


@pytest.mark.parametrize("name", CASES)
def test_the_kernels_of_a_gpu(
    name: str, engine: Callable[..., Any], model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same calls as there, each kernel's own fallback behind them."""
    running = engine(model(name), **decimamba(name))
    monkeypatch.setattr(FilteredMixer, "runs_own_kernels", lambda mixer: True)
    prompts = prompts_of(name)[3:6]
    for prompt, result in zip(prompts, running.generate(prompts), strict=True):
        assert_decimated(model(name), name, prompt, result)


@pytest.mark.parametrize("name", CASES)
def test_decoding_requests_in_the_same_step_and_preemption(
    name: str, engine: Callable[..., Any], model: Callable[[str], Path]
) -> None:
    """A resumed request is read again over prompt and generated tokens, which are all kept."""
    running = engine(model(name), **decimamba(name)).llm.llm_engine
    prompts = dict(enumerate(prompts_of(name)[2:]))
    finished: dict[str, Any] = {}
    scheduler = running.engine_core.engine_core.scheduler
    preempted = 0
    for step in range(100):
        if prompts and step % 3 == 0:
            number = min(prompts)
            running.add_request(str(number), {"prompt_token_ids": prompts.pop(number)}, sampling(24))
        if step in (8, 17):
            assert running.reset_prefix_cache(reset_running_requests=True)
            preempted += sum(request.num_preemptions > 0 for request in scheduler.requests.values())
        finished |= {output.request_id: output for output in running.step() if output.finished}
        if not prompts and not running.has_unfinished_requests():
            break
    assert preempted > 3
    for number, prompt in enumerate(prompts_of(name)[2:]):
        assert_decimated(model(name), name, prompt, completion(finished[str(number)]))


def test_log_probabilities_of_dropped_tokens_are_refused(
    engine: Callable[..., Any], model: Callable[[str], Path]
) -> None:
    from vllm import SamplingParams

    running = engine(model("falcon_mamba"), **decimamba("falcon_mamba")).llm
    asking = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    short, long = ({"prompt_token_ids": random_token_ids(length)} for length in (51, 52))
    (output,) = running.generate([short], asking, use_tqdm=False)
    assert len(output.prompt_logprobs) == 51
    with pytest.raises(ValueError, match="prompt_logprobs was asked for, but a prompt of 52 tokens is decimated"):
        running.generate([long], asking, use_tqdm=False)
    assert not running.llm_engine.has_unfinished_requests()
