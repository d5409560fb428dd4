"""A Mamba-2 model with draft tokens, step by step and without an engine, against the reference."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from draft_kernels import DRAFTS, NGRAMS, run_as_on_a_gpu
from engine.harness import write_table
from references.reference_lm import reference_logprobs
from stepped_model import SteppedModel, step_metadata
from tiny_models import random_token_ids, write_mamba2_original

TOLERANCE = 1e-3


@dataclass
class Part:
    """Some tokens of a request in one step.

    Attributes:
        slot: of the request.
        prompt: its length.
        before: how many tokens it had.
        tokens: those of this step.
        accepted: how many of its last step's tokens are kept.
        is_decode: whether the tokens but the first are drafts.
    """

    slot: int
    prompt: int
    before: int
    tokens: list[int]
    accepted: int = 1
    is_decode: bool = False


@torch.inference_mode()
def run(model: SteppedModel, parts: Sequence[Part]) -> list[np.ndarray]:
    """The log-probabilities after each token of each part; decodes come first."""
    from vllm.config import set_current_vllm_config
    from vllm.forward_context import set_forward_context

    def of_parts(value: Callable[[Part], Any], **kind: Any) -> torch.Tensor:
        return torch.tensor([value(part) for part in parts], **kind)

    lengths = [len(part.tokens) for part in parts]
    common = step_metadata(
        lengths,
        [part.before + len(part.tokens) for part in parts],
        [[1 + part.slot * (1 + DRAFTS) + i for i in range(1 + DRAFTS)] for part in parts],
        [part.before < part.prompt for part in parts],
        [part.prompt for part in parts],
    )
    metadata = model.builder.build(
        0,
        common,
        num_accepted_tokens=of_parts(lambda part: part.accepted, dtype=torch.int32),
        num_decode_draft_tokens_cpu=of_parts(lambda part: len(part.tokens) - 1 if part.is_decode else -1),
    )
    ids = torch.tensor([token for part in parts for token in part.tokens])
    with (
        set_current_vllm_config(model.config),
        set_forward_context(dict.fromkeys(model.names, metadata), model.config),
    ):
        hidden = model.model(ids, torch.arange(len(ids)))
        logprobs = model.model.compute_logits(hidden).log_softmax(-1)
    return [part.numpy() for part in logprobs.split(lengths)]


def test_draft_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("on the CPU only; tests/engine/test_speculative.py runs on a GPU")
    run_as_on_a_gpu(monkeypatch)
    folder = write_mamba2_original(tmp_path / "model")
    table = write_table(folder, tmp_path / "table.safetensors")
    options = {
        "model_impl": "longmamba",
        "additional_config": {"longmamba": {"table": str(tmp_path / "table.safetensors")}},
    }
    model = SteppedModel(folder, slots=3 * (1 + DRAFTS), **options, speculative_config=NGRAMS)
    first, second, third = (random_token_ids(length, seed=length) for length in (300, 129, 400))
    answer, wrong = random_token_ids(6, seed=1), random_token_ids(3, seed=2)

    def expect(prompt: list[int], found: np.ndarray, start: int) -> None:
        row = table.row_of(len(prompt))
        filters = {layer: table.thresholds(layer)[row] for layer in table.layers}
        expected = reference_logprobs(folder, prompt + answer, prompt_length=len(prompt), filters=filters).numpy()
        expected = expected[start : start + len(found)]
        np.testing.assert_allclose(found[:, : expected.shape[1]], expected, rtol=0, atol=TOLERANCE)

    # A whole prompt, and all but the last token of another.
    whole, _ = run(model, [Part(0, 300, 0, first), Part(1, 129, 0, second[:-1])])
    expect(first, whole[-1:], 299)
    # A right and two wrong drafts; a prompt's last token, which vLLM pads with drafts; beside them a prompt.
    drafts = Part(0, 300, 300, answer[:2] + wrong[:2], is_decode=True)
    end = Part(1, 129, 128, second[-1:] + wrong, is_decode=True)
    decoded, ended, third_whole = run(model, [drafts, end, Part(2, 400, 0, third)])
    expect(first, decoded[:2], 300)
    expect(second, ended[:1], 128)
    expect(third, third_whole[-1:], 399)
    # What was right is kept.
    again = [
        Part(0, 300, 302, answer[2:4], accepted=2, is_decode=True),
        Part(1, 129, 129, answer[:3], is_decode=True),
        Part(2, 400, 400, answer[:4], is_decode=True),
    ]
    for prompt, found, start in zip((first, second, third), run(model, again), (302, 129, 400), strict=True):
        expect(prompt, found, start)
    model.close()
