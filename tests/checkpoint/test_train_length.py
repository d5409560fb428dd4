"""Tests of vllm_longmamba/checkpoint/train_length.py."""

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_longmamba.checkpoint.train_length import DEFAULT_MAX_MODEL_LEN, set_default_length, train_length
from vllm_longmamba.options import LongMambaOptions

INF = float("inf")


def model_config(given: int | None, in_config: float, *, model_type: str = "zamba2", **config: Any) -> Any:
    """What `set_default_length` reads of vLLM's `ModelConfig`."""
    text_config = SimpleNamespace(model_type=model_type, **config)
    if in_config != INF:
        text_config.max_position_embeddings = in_config
    arch_config = SimpleNamespace(derived_max_model_len_and_key=(in_config, "max_position_embeddings"))
    return SimpleNamespace(hf_text_config=text_config, model_arch_config=arch_config, max_model_len=given)


def test_default_length_is_long() -> None:
    assert DEFAULT_MAX_MODEL_LEN == 131072


@pytest.mark.parametrize(
    ("model_type", "given", "in_config", "max_model_len", "derived", "positions"),
    [
        ("mamba", None, INF, None, 131072, None),
        ("mamba2", -1, INF, -1, 131072, None),
        ("falcon_mamba", None, INF, None, 131072, None),
        ("mamba", 500, INF, 500, 131072, None),
        ("mamba2", 500000, INF, 500000, 500000, None),
        ("zamba2", None, 4096, -1, 131072, 131072),
        ("zamba2", -1, 4096, -1, 131072, 131072),
        ("jamba", None, 262144, -1, 262144, 262144),
        ("zamba2", 1000, 4096, 1000, 131072, 4096),
        ("zamba2", 4097, 4096, 4097, 131072, 4097),
        ("zamba2", 300000, 4096, 300000, 300000, 300000),
    ],
    ids=[
        "mamba",
        "mamba2-fitted",
        "falcon",
        "mamba-shorter",
        "mamba-longer",
        "hybrid",
        "hybrid-fitted",
        "hybrid-of-long-config",
        "hybrid-shorter",
        "hybrid-above-config",
        "hybrid-longer",
    ],
)
def test_set_default_length(
    model_type: str,
    given: int | None,
    in_config: float,
    max_model_len: int | None,
    derived: int,
    positions: int | None,
) -> None:
    config = model_config(given, in_config, model_type=model_type)
    set_default_length(config)
    assert config.max_model_len == max_model_len
    assert config.model_arch_config.derived_max_model_len_and_key[0] == derived
    assert getattr(config.hf_text_config, "max_position_embeddings", None) == positions


def test_set_default_length_with_scaled_rotary_embedding() -> None:
    rope = {"rope_type": "yarn", "factor": 4.0}
    config = model_config(None, 16384, model_type="falcon_h1", rope_parameters=rope)
    set_default_length(config)
    assert config.model_arch_config.derived_max_model_len_and_key[0] == 16384
    assert config.hf_text_config.max_position_embeddings == 16384
    config = model_config(20000, 16384, model_type="falcon_h1", rope_parameters=rope)
    with pytest.raises(ValueError, match=r"\(yarn\).* beyond 16384 positions; pass --max-model-len 16384 or less"):
        set_default_length(config)


@pytest.mark.parametrize(
    ("config", "option", "expected"),
    [
        ({"model_type": "mamba", "vocab_size": 50280}, None, 2048),
        ({"model_type": "mamba2", "vocab_size": 50288}, None, 2048),
        ({"model_type": "mamba", "vocab_size": 50277}, None, 2048),
        ({"model_type": "falcon_mamba"}, None, 8192),
        ({"model_type": "mamba", "vocab_size": 50280}, 512, 512),
        ({"model_type": "zamba2", "max_position_embeddings": 4096}, None, 4096),
        ({"model_type": "zamba2", "max_position_embeddings": 4096}, 100, 100),
    ],
    ids=["mamba", "mamba2", "mamba-unpadded", "falcon", "option", "config", "option-before-config"],
)
def test_train_length(config: dict[str, Any], option: int | None, expected: int) -> None:
    assert train_length(SimpleNamespace(**config), LongMambaOptions(train_length=option)) == expected


def test_train_length_survives_a_longer_context() -> None:
    config = model_config(300000, 4096)
    set_default_length(config)
    assert config.hf_text_config.max_position_embeddings == 300000
    assert train_length(config.hf_text_config, LongMambaOptions()) == 4096


@pytest.mark.parametrize(
    "config",
    [{"model_type": "new"}, {"model_type": "mamba", "vocab_size": 65024}, {"model_type": "mamba2", "vocab_size": 264}],
    ids=["another-family", "mamba-of-others", "example"],
)
def test_train_length_unknown(config: dict[str, Any]) -> None:
    message = rf"the training length of this '{config['model_type']}' model is not known"
    with pytest.raises(ValueError, match=message) as error:
        train_length(SimpleNamespace(**config), LongMambaOptions())
    assert """--additional-config '{"longmamba": {"train_length": N}}'""" in str(error.value)
    assert "`longmamba calibrate MODEL --train-length N`" in str(error.value)


@pytest.mark.parametrize(
    ("name", "expected"), [("Zamba2Config", 4096), ("JambaConfig", 262144), ("FalconMambaConfig", 8192)]
)
def test_train_length_of_published_configs(name: str, expected: int) -> None:
    import transformers

    assert train_length(getattr(transformers, name)(), LongMambaOptions()) == expected
