"""vLLM's models of DeciMamba's mixers, step by step, against the torch reference."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
import torch
from decimated_models import CASES
from stepped_model import Request, SteppedModel

from vllm_longmamba.layers import mamba1
from vllm_longmamba.layers.decimated_mixer import DecimatedMixer
from vllm_longmamba.layers.filtered_mixer import FilteredMixer

TOLERANCE = 1e-3


@pytest.fixture(scope="module", params=CASES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator["Model"]:
    """Each case in turn."""
    if torch.cuda.is_available():
        pytest.skip("on the CPU only; tests/engine/test_decimamba.py runs on a GPU")
    case = CASES[request.param]
    folder = case.write(tmp_path_factory.mktemp("decimated") / request.param, **case.model)
    stepped = SteppedModel(folder, **case.arguments)
    yield Model(request.param, folder, stepped)
    stepped.close()


class Model:
    def __init__(self, name: str, folder: Path, stepped: SteppedModel) -> None:
        self.case, self.folder, self.step = CASES[name], folder, stepped.step
        self.mixers = list(stepped.config.compilation_config.static_forward_context.values())

    def requests(self) -> list[Request]:
        return [Request(prompt) for prompt in self.case.prompts()]

    def check(self, requests: list[Request], ends: list[int] | None = None) -> None:
        for request in requests:
            expected = self.case.logprobs(self.folder, request.prompt, request.generated, ends)
            actual = torch.stack(request.logits).log_softmax(-1).numpy()
            np.testing.assert_allclose(actual, expected[-len(actual) :, : actual.shape[1]], rtol=0, atol=TOLERANCE)


def use_kernels(of_a_gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, their own fallbacks stand behind the kernels that a GPU runs."""
    monkeypatch.setattr(FilteredMixer, "runs_own_kernels", lambda mixer: of_a_gpu)
    # On a CPU, vLLM packs the weight of dt_proj, which an update of few tokens would read.
    monkeypatch.setattr(mamba1, "MOST_PROJECTED", 0)


def generate(requests: list[Request]) -> None:
    """Add the likeliest token."""
    for request in requests:
        request.generated.append(int(request.logits[-1].argmax()))


@pytest.mark.parametrize("own_kernels", [False, True], ids=["vllm's kernels", "the kernels of a GPU"])
def test_a_batch_of_prompts_and_its_decoding(model: Model, own_kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    use_kernels(own_kernels, monkeypatch)
    requests = model.requests()
    slots = list(enumerate(requests, 1))
    model.step([], slots)
    for _ in range(2):
        generate(requests)
        model.step(slots, [])
    model.check(requests)


@pytest.mark.parametrize("own_kernels", [False, True], ids=["vllm's kernels", "the kernels of a GPU"])
def test_decoding_requests_in_the_same_step(model: Model, own_kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    use_kernels(own_kernels, monkeypatch)
    first, then = model.requests()[3:6], model.requests()[4:]
    slots = list(enumerate(first, 5))
    model.step([], slots)
    generate(first)
    model.step(slots, list(enumerate(then, 1)))
    model.check([*first, *then])


def test_a_resumed_request_keeps_what_it_generated(model: Model) -> None:
    """A preempted request is read again over its prompt and those tokens."""
    requests = model.requests()[2:]
    model.step([], list(enumerate(requests, 1)))
    for request in requests:
        request.generated += model.case.prompts()[4][:30]
        request.logits.clear()
    model.step([], list(enumerate(requests, 3)))
    generate(requests)
    model.step(list(enumerate(requests, 3)), [])
    model.check(requests)


def test_one_prompt(model: Model) -> None:
    """Without others beside it, in steps of its own."""
    for request in model.requests()[4:]:
        model.step([], [(2, request)])
        model.check([request])


def test_no_layer_drops_tokens_of_short_prompts(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DecimatedMixer, "_decimate", lambda *_: pytest.fail("a layer dropped tokens"))
    requests = model.requests()[:4]
    model.step([], list(enumerate(requests, 1)))
    model.check(requests)


@pytest.mark.parametrize("own_kernels", [False, True], ids=["vllm's kernels", "the kernels of a GPU"])
def test_a_cut_prompt_keeps_its_share_of_each_part(
    model: Model, own_kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Short parts keep one token where their share is none; those of one token are decode steps to vLLM."""
    use_kernels(own_kernels, monkeypatch)
    for mixer in model.mixers:
        monkeypatch.setattr(mixer, "options", replace(mixer.options, cut_prompts=True))
    cut, beside = Request(model.case.prompts()[-1]), Request(model.case.prompts()[3])
    parts = [100, 1, 60, 7, 7, 5, 1, 200, 69, 1]
    model.step([], [(3, beside)])
    for part in parts:
        generate([beside])
        model.step([(3, beside)], [(1, cut)], part)
    assert cut.read == len(cut.prompt)
    del cut.logits[:-1]
    generate([cut])
    model.step([(1, cut)], [])
    model.check([cut], list(accumulate(parts)))
    model.check([beside])
