"""What --model-impl decimamba makes of vLLM's arguments, and what it refuses, before any weight is loaded."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import write_mamba1_original, write_mamba2_original

from vllm_longmamba.decimamba_options import DeciMambaOptions, options_from_config
from vllm_longmamba.engine.decimamba_config import refuse_request

SETTINGS = {"layers": [1], "L_base": 100}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mamba-1 of three layers."""
    return write_mamba1_original(tmp_path_factory.mktemp("models") / "mamba1")


def config_of(model: Path, settings: Any = SETTINGS, **engine_args: Any) -> Any:
    """vLLM's configuration; no engine is started."""
    from vllm.engine.arg_utils import EngineArgs

    arguments: dict[str, Any] = {"model_impl": "decimamba", "additional_config": {"decimamba": settings}}
    arguments |= {"skip_tokenizer_init": True, "enforce_eager": True} | engine_args
    return EngineArgs(model=str(model), **arguments).create_engine_config()


def write_config(folder: Path, d_model: int, n_layer: int, vocab_size: int, layer: str = "Mamba1") -> Path:
    """A checkpoint of state-spaces without weights."""
    config = {"d_model": d_model, "n_layer": n_layer, "vocab_size": vocab_size, "ssm_cfg": {"layer": layer}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_prompt_is_one_step_by_default(model: Path) -> None:
    config = config_of(model)
    assert config.model_config.max_model_len == 131072
    assert not config.scheduler_config.enable_chunked_prefill
    assert config.scheduler_config.max_num_batched_tokens == 131072
    assert not config.cache_config.enable_prefix_caching
    assert config.model_config.architecture == "DeciMambaForCausalLM"


def test_prompts_are_cut_where_the_option_says_so(model: Path) -> None:
    cut = SETTINGS | {"cut_prompts": True}
    config = config_of(model, cut, max_num_batched_tokens=500, long_prefill_token_threshold=100)
    assert config.scheduler_config.enable_chunked_prefill
    assert config.scheduler_config.max_num_batched_tokens == 500
    with pytest.raises(ValueError, match="does not support --enable-prefix-caching"):
        config_of(model, cut, enable_prefix_caching=True)


def test_one_step_of_several_prompts(model: Path) -> None:
    config = config_of(model, max_model_len=1000, max_num_batched_tokens=5000, enable_chunked_prefill=False)
    assert config.scheduler_config.max_num_batched_tokens == 5000


def test_other_models_are_still_cut(model: Path) -> None:
    config = config_of(model, model_impl="longmamba", additional_config={"longmamba": {"filter": False}})
    assert config.scheduler_config.enable_chunked_prefill


def test_workers_read_complete_options(model: Path) -> None:
    given = config_of(model).additional_config
    assert options_from_config(json.loads(json.dumps(given))) == DeciMambaOptions((1,), 100)


@pytest.mark.parametrize(
    ("d_model", "n_layer", "settings", "expected"),
    [
        (768, 24, {}, DeciMambaOptions((12,), 2000)),
        (2048, 48, {}, DeciMambaOptions((12,), 4000)),
        (2048, 48, {"L_base": 8000}, DeciMambaOptions((12,), 8000)),
        (2560, 64, {"layers": [20, 30], "beta": 0.5}, DeciMambaOptions((20, 30), 4000, 0.5)),
    ],
    ids=["130m", "1.4b", "1.4b-other-L_base", "2.8b-other-layers"],
)
def test_published_settings(
    d_model: int, n_layer: int, settings: dict[str, Any], expected: DeciMambaOptions, tmp_path: Path
) -> None:
    config = config_of(write_config(tmp_path, d_model, n_layer, 50277), settings)
    assert options_from_config(config.additional_config) == expected


@pytest.mark.parametrize(
    ("n_layer", "vocab_size", "layer"), [(48, 32000, "Mamba1"), (48, 50277, "Mamba2"), (47, 50277, "Mamba1")]
)
def test_other_models_need_settings(n_layer: int, vocab_size: int, layer: str, tmp_path: Path) -> None:
    folder = write_config(tmp_path, 2048, n_layer, vocab_size, layer)
    with pytest.raises(ValueError, match=r"no settings are published for .*; layers and L_base must be given, such as"):
        config_of(folder, {})
    with pytest.raises(ValueError, match="; L_base must be given, such as"):
        config_of(folder, {"layers": [3]})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": [3], "L_base": 9}, r"layers must lie between 0 and 2, the last layer of .*, but are \[3\]"),
        ({"layers": [1], "L_base": 9, "bete": 1}, "unknown option bete; known are layers, L_base, beta, min_tokens"),
        ({"layers": [1], "L_base": -9}, "L_base must be a positive number of tokens, but is -9"),
    ],
    ids=["no-such-layer", "unknown", "range"],
)
def test_wrong_options(settings: dict[str, Any], message: str, model: Path) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(model, settings)


@pytest.mark.parametrize(
    ("engine_args", "message"),
    [
        (
            {"enable_chunked_prefill": True},
            "does not support --enable-chunked-prefill: without its option cut_prompts it chooses",
        ),
        ({"long_prefill_token_threshold": 500}, "does not support --long-prefill-token-threshold: .* one step"),
        ({"max_num_batched_tokens": 8192}, r"max_num_batched_tokens \(8192\) is smaller than max_model_len \(131072\)"),
        ({"max_num_scheduled_tokens": 8192}, "--max-num-scheduled-tokens 8192 below max_model_len 131072: .* one step"),
        (
            {"enable_prefix_caching": True},
            "does not support --enable-prefix-caching: .* cannot be shared; leave it out",
        ),
        ({"pipeline_parallel_size": 2}, "does not support --pipeline-parallel-size: later ranks would not know"),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}},
            "does not support --speculative-config",
        ),
        (
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            "does not support --kv-transfer-config",
        ),
        ({"kv_offloading_size": 0.25}, "does not support --kv-transfer-config and --kv-offloading-size"),
        ({"mamba_backend": "flashinfer"}, "does not support --mamba-backend flashinfer with Mamba-1 layers"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments_of_vllm(engine_args: dict[str, Any], message: str, model: Path) -> None:
    if "pipeline_parallel_size" in engine_args and torch.cuda.device_count() == 1:
        pytest.skip("vLLM refuses more ranks than GPUs")
    with pytest.raises(ValueError, match=message):
        config_of(model, **engine_args)


def test_an_unsupported_use_of_the_state(tmp_path: Path) -> None:
    model = write_mamba2_original(tmp_path / "mamba2", n_layer=2)
    with pytest.raises(ValueError, match="does not support --use-replayssm"):
        config_of(model, use_replayssm=True)


def test_batch_invariance(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    with pytest.raises(ValueError, match="--model-impl decimamba does not support VLLM_BATCH_INVARIANT=1: neither"):
        config_of(model)


def test_a_hybrid_is_refused(tmp_path: Path) -> None:
    from transformers import Zamba2Config

    Zamba2Config(architectures=["Zamba2ForCausalLM"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Zamba2ForCausalLM has no DeciMamba variant"):
        config_of(tmp_path)


@pytest.mark.parametrize(
    ("length", "sampling", "refused"),
    [
        (102, {"prompt_logprobs": 0}, "prompt_logprobs was asked for, but a prompt of 102 tokens is decimated"),
        (102, {"prompt_logprob_token_ids": [1]}, "prompt_logprob_token_ids was asked for"),
        (101, {"prompt_logprobs": 0}, None),
        (102, {"prompt_logprobs": None}, None),
        (102, None, None),
    ],
    ids=["all", "tail", "short", "not-asked", "no-sampling"],
)
def test_prompt_logprobs(length: int, sampling: dict[str, Any] | None, refused: str | None) -> None:
    vllm_config = SimpleNamespace(additional_config={"decimamba": SETTINGS})
    parameters = None if sampling is None else SimpleNamespace(**sampling)
    request = SimpleNamespace(prompt_token_ids=[0] * length, sampling_params=parameters, resumable=False)
    if refused is None:
        refuse_request(vllm_config, request)
    else:
        with pytest.raises(ValueError, match=refused):
            refuse_request(vllm_config, request)


def test_a_streamed_prompt() -> None:
    vllm_config = SimpleNamespace(additional_config={"decimamba": SETTINGS})
    request = SimpleNamespace(prompt_token_ids=[0], sampling_params=None, resumable=True)
    with pytest.raises(ValueError, match="a prompt cannot be streamed in"):
        refuse_request(vllm_config, request)
