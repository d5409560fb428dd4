"""Tests of vllm_longmamba/checkpoint/original_config.py."""

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_longmamba.checkpoint.original_config import (
    ORIGINAL_FORMAT_ATTRIBUTE,
    is_original_format,
    register_config_parser,
    translate_original_config,
)


def mamba1(d_model: int, n_layer: int, **changes: Any) -> dict[str, Any]:
    """config.json of state-spaces/mamba-*, as published."""
    return {
        "d_model": d_model,
        "n_layer": n_layer,
        "vocab_size": 50277,
        "ssm_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 8,
    } | changes


def mamba2(d_model: int, n_layer: int, ssm_cfg: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """config.json of state-spaces/mamba2-*, as published."""
    return {
        "d_model": d_model,
        "d_intermediate": 0,
        "n_layer": n_layer,
        "vocab_size": 50277,
        "ssm_cfg": {"layer": "Mamba2"} | (ssm_cfg or {}),
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 16,
        "tie_embeddings": True,
    } | changes


SIZES = [(768, 24), (1024, 48), (1536, 48), (2048, 48), (2560, 64)]
SIZE_IDS = ["130m", "370m", "790m", "1.3b/1.4b", "2.7b/2.8b"]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (mamba1(768, 24), True),
        (mamba2(768, 24), True),
        ({"d_model": 8, "n_layer": 1, "vocab_size": 10}, True),
        ({"model_type": "mamba", "d_model": 8, "n_layer": 1, "vocab_size": 10}, False),
        ({"hidden_size": 8}, False),
        ({}, False),
    ],
    ids=["mamba1", "mamba2", "shortest", "has-model-type", "another", "empty"],
)
def test_is_original_format(config: dict[str, Any], expected: bool) -> None:
    assert is_original_format(config) is expected


@pytest.mark.parametrize(("d_model", "n_layer"), SIZES, ids=SIZE_IDS)
def test_translate_mamba1(d_model: int, n_layer: int) -> None:
    from transformers import MambaConfig

    translated = translate_original_config(mamba1(d_model, n_layer))
    assert translated == {
        "model_type": "mamba",
        "architectures": ["MambaForCausalLM"],
        "vocab_size": 50280,
        "hidden_size": d_model,
        "num_hidden_layers": n_layer,
        "expand": 2,
        "conv_kernel": 4,
        "use_bias": False,
        "use_conv_bias": True,
        "residual_in_fp32": True,
        "tie_word_embeddings": True,
        "layer_norm_epsilon": 1e-5,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "state_size": 16,
        "time_step_rank": "auto",
        ORIGINAL_FORMAT_ATTRIBUTE: "Mamba1",
    }
    assert translated.pop("model_type") == MambaConfig.model_type
    config = MambaConfig(**translated)
    assert (config.intermediate_size, config.time_step_rank) == (2 * d_model, d_model // 16)


@pytest.mark.parametrize(("d_model", "n_layer"), SIZES, ids=SIZE_IDS)
def test_translate_mamba2(d_model: int, n_layer: int) -> None:
    from transformers import Mamba2Config

    translated = translate_original_config(mamba2(d_model, n_layer))
    assert translated == {
        "model_type": "mamba2",
        "architectures": ["Mamba2ForCausalLM"],
        "vocab_size": 50288,
        "hidden_size": d_model,
        "num_hidden_layers": n_layer,
        "expand": 2,
        "conv_kernel": 4,
        "use_bias": False,
        "use_conv_bias": True,
        "residual_in_fp32": True,
        "tie_word_embeddings": True,
        "layer_norm_epsilon": 1e-5,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "state_size": 128,
        "head_dim": 64,
        "num_heads": d_model // 32,
        "n_groups": 1,
        "chunk_size": 256,
        ORIGINAL_FORMAT_ATTRIBUTE: "Mamba2",
    }
    assert translated.pop("model_type") == Mamba2Config.model_type
    config = Mamba2Config(**translated)
    assert (config.num_heads * config.head_dim, config.n_groups) == (2 * d_model, 1)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            mamba1(64, 2, ssm_cfg={"layer": "Mamba1", "d_state": 8, "dt_rank": 5}),
            {"state_size": 8, "time_step_rank": 5},
        ),
        (mamba1(64, 2, ssm_cfg=None), {"state_size": 16}),
        (mamba1(64, 2, vocab_size=50280), {"vocab_size": 50280}),
        (mamba1(64, 2, tie_embeddings=False), {"tie_word_embeddings": False}),
        (mamba1(64, 2, ssm_cfg={"bias": True, "conv_bias": False}), {"use_bias": True, "use_conv_bias": False}),
        (mamba1(64, 2, ssm_cfg={"dt_min": 0.01, "use_fast_path": False, "d_conv": 3}), {"conv_kernel": 3}),
        (
            mamba2(64, 2, {"d_state": 32, "headdim": 16, "ngroups": 2, "chunk_size": 32, "expand": 3}),
            {"state_size": 32, "head_dim": 16, "num_heads": 12, "n_groups": 2, "chunk_size": 32, "expand": 3},
        ),
        (mamba2(64, 2, {"dt_limit": (0.0, float("inf")), "rmsnorm": True, "A_init_range": [1, 16]}), {"expand": 2}),
        (json.loads(json.dumps(mamba2(64, 2, {"dt_limit": [0.0, float("inf")]}))), {"n_groups": 1}),
    ],
    ids=["d_state", "no-ssm_cfg", "vocabulary-fits", "untied", "biases", "training-only", "shape", "tuple", "json"],
)
def test_translate_options(config: dict[str, Any], expected: dict[str, Any]) -> None:
    translated = translate_original_config(config)
    assert {name: translated[name] for name in expected} == expected


def test_translate_leaves_its_argument_alone() -> None:
    config = mamba2(64, 2, {"headdim": 16})
    before = json.dumps(config)
    translate_original_config(config)
    assert json.dumps(config) == before


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (mamba1(64, 2, rms_norm=False), r"^config\.json: rms_norm must be True .* but is False"),
        (mamba2(64, 2, d_intermediate=128), r"^config\.json: d_intermediate must be 0 .* but is 128"),
        (mamba2(64, 2, attn_layer_idx=[1]), r"^config\.json: attn_layer_idx must be \[\] .* but is \[1\]"),
        (mamba1(64, 2, ssm_cfg={"layer": "Mamba3"}), r"ssm_cfg\.layer must be 'Mamba1' or 'Mamba2', but is 'Mamba3'"),
        (mamba2(64, 2, {"rmsnorm": False}), r"^config\.json: ssm_cfg: rmsnorm must be True .* but is False"),
        (mamba2(64, 2, {"norm_before_gate": True}), r"ssm_cfg: norm_before_gate must be False .* but is True"),
        (mamba2(64, 2, {"D_has_hdim": True}), r"ssm_cfg: D_has_hdim must be False .* but is True"),
        (mamba2(64, 2, {"d_ssm": 64}), r"ssm_cfg: d_ssm must be None .* but is 64"),
        (
            mamba2(64, 2, {"dt_limit": [0.0, 0.1]}),
            r"ssm_cfg.dt_limit must be .* but is \[0\.0, 0\.1\]",
        ),
        (mamba2(64, 2, {"new_option": 1, "also_new": 2}), r"ssm_cfg has options not known for Mamba2: also_new, new_"),
        (mamba1(64, 2, ssm_cfg={"headdim": 64}), r"ssm_cfg has options not known for Mamba1: headdim"),
    ],
    ids=[
        "rms_norm",
        "d_intermediate",
        "attn_layer_idx",
        "layer",
        "rmsnorm",
        "norm_before_gate",
        "D_has_hdim",
        "d_ssm",
        "dt_limit",
        "unknown-mamba2",
        "unknown-mamba1",
    ],
)
def test_translate_refuses(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        translate_original_config(config)


def write_config(folder: Path, config: dict[str, Any]) -> str:
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize(
    ("config", "model_type"), [(mamba1(64, 2), "mamba"), (mamba2(64, 2), "mamba2")], ids=["mamba1", "mamba2"]
)
def test_registered_parser_reads_original_checkpoints(config: dict[str, Any], model_type: str, tmp_path: Path) -> None:
    from vllm.transformers_utils.config import get_config, get_config_parser

    register_config_parser()
    parser = type(get_config_parser("hf"))
    register_config_parser()
    assert type(get_config_parser("hf")) is parser
    parsed = get_config(write_config(tmp_path, config), trust_remote_code=False)
    assert (parsed.model_type, parsed.hidden_size, parsed.num_hidden_layers) == (model_type, 64, 2)
    assert getattr(parsed, ORIGINAL_FORMAT_ATTRIBUTE) == ("Mamba1" if model_type == "mamba" else "Mamba2")


def test_registered_parser_leaves_other_configs_alone(tmp_path: Path) -> None:
    from transformers import Mamba2Config
    from vllm.transformers_utils.config import get_config

    register_config_parser()
    Mamba2Config(num_hidden_layers=3).save_pretrained(tmp_path)
    parsed = get_config(str(tmp_path), trust_remote_code=False)
    assert parsed.num_hidden_layers == 3
    assert not hasattr(parsed, ORIGINAL_FORMAT_ATTRIBUTE)


@pytest.mark.parametrize(
    ("config", "message"),
    [({"hidden_size": 8}, "model_type"), (mamba1(64, 2, rms_norm=False), "rms_norm must be True")],
    ids=["stock-error", "our-error"],
)
def test_registered_parser_refuses(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    from vllm.transformers_utils.config import get_config

    register_config_parser()
    with pytest.raises(ValueError, match=message):
        get_config(write_config(tmp_path, config), trust_remote_code=False)
