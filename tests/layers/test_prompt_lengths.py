"""Tests of vllm_longmamba/engine/prompt_lengths.py: prompts that are computed for another engine."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vllm_longmamba.engine.prompt_lengths import keep_prompt_length, shown_to_builders, whole_prompt_length

REMOTE = {"kv_transfer_params": {"do_remote_decode": True}, "own": 1}


def request_of(length: int, extra: dict[str, Any] | None) -> Any:
    """The fields of vLLM's `EngineCoreRequest` that are read."""
    params = SimpleNamespace(extra_args=extra)
    return SimpleNamespace(prompt_token_ids=list(range(length)), prompt_embeds=None, sampling_params=params)


def test_keep_prompt_length() -> None:
    request = request_of(70, REMOTE)
    keep_prompt_length(request)
    kept = request.sampling_params.extra_args
    assert whole_prompt_length(request.sampling_params) == 70
    # vLLM writes into this very mapping.
    assert kept["kv_transfer_params"] is REMOTE["kv_transfer_params"]
    assert kept["own"] == 1
    assert "longmamba_prompt_length" not in REMOTE


@pytest.mark.parametrize(
    "extra", [None, {}, {"own": 1}, {"kv_transfer_params": None}, {"kv_transfer_params": {"do_remote_prefill": True}}]
)
def test_other_requests_stay(extra: dict[str, Any] | None) -> None:
    request = request_of(70, extra)
    keep_prompt_length(request)
    assert request.sampling_params.extra_args == extra
    assert whole_prompt_length(request.sampling_params) is None


@pytest.mark.parametrize("sent", [999_999, "x"])
def test_no_client_sets_the_length(sent: Any) -> None:
    request = request_of(70, {"longmamba_prompt_length": sent, "own": 1})
    keep_prompt_length(request)
    assert request.sampling_params.extra_args == {"own": 1}
    request = request_of(70, {"longmamba_prompt_length": sent, **REMOTE})
    keep_prompt_length(request)
    assert whole_prompt_length(request.sampling_params) == 70


def test_pooling_requests_stay() -> None:
    keep_prompt_length(SimpleNamespace(sampling_params=None))
    assert whole_prompt_length(None) is None


@pytest.mark.parametrize(("connector", "seen"), [(object(), [30, 71]), (None, [30, 70])], ids=["connector", "none"])
def test_runner_v1_shows_whole_prompts(connector: Any, seen: list[int]) -> None:
    arch_config = SimpleNamespace(rswa_window=None)
    requests = {"a": request_of(30, None), "b": request_of(71, REMOTE)}
    keep_prompt_length(requests["b"])
    runner = SimpleNamespace(
        model_config=SimpleNamespace(model_arch_config=arch_config, max_model_len=4096),
        vllm_config=SimpleNamespace(kv_transfer_config=connector),
        input_batch=SimpleNamespace(req_ids=["a", "b"], num_prompt_tokens=np.array([30, 70], np.int32)),
        requests=requests,
    )
    with shown_to_builders(runner):
        assert runner.input_batch.num_prompt_tokens.tolist() == seen
        assert arch_config.rswa_window == 4096
    assert runner.input_batch.num_prompt_tokens.tolist() == [30, 70]
    assert arch_config.rswa_window is None
