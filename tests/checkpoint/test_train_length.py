"""Tests of vllm_longmamba/checkpoint/train_length.py."""

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_longmamba.checkpoint.train_length import DEFAULT_MAX_MODEL_LEN, set_default_length, train_length
from vllm_longmamba.options import LongMambaOptions

INF = float("inf")


def model_config(
    given: int | None, in_config: float, *, model_type: str = "zamba2", overrides: Any = None, **config: Any
) -> Any:
    """What `set_default_length` reads of vLLM's `ModelConfig`."""
    text_config = SimpleNamespace(model_type=model_type, **config)
    if in_config != INF:
        text_config.max_position_embeddings = in_config
    arch_config = SimpleNamespace(derived_max_model_len_and_key=(in_config, "max_position_embeddings"))
    return SimpleNamespace(
        hf_text_config=text_config, model_arch_config=arch_config, max_model_len=given, hf_overrides=overrides or {}
    )


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


YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096}
LINEAR = {"rope_type": "linear", "factor": 4.0}


@pytest.mark.parametrize(
    ("rope", "in_config", "derived", "reach"),
    [
        # A config that was published with it, and one that the user has changed with --hf-overrides.
        (YARN, 32768, 32768, 32768),
        (YARN, 4096, 32768, 32768),
        # vLLM multiplies the length by the factor.
        (LINEAR, 4096, 4096, 16384),
        ({"rope_type": "dynamic", "factor": 4.0}, 16384, 16384, 16384),
    ],
    ids=["yarn", "yarn by the user", "linear", "dynamic"],
)
def test_set_default_length_with_scaled_rotary_embedding(
    rope: dict[str, Any], in_config: int, derived: int, reach: int
) -> None:
    for given in (None, 1000, reach):
        config = model_config(given, in_config, rope_parameters=rope)
        set_default_length(config)
        assert config.max_model_len == (given or -1)
        assert config.model_arch_config.derived_max_model_len_and_key[0] == derived
        assert config.hf_text_config.max_position_embeddings == in_config
    config = model_config(reach + 1, in_config, rope_parameters=rope)
    with pytest.raises(ValueError, match=rf"beyond {reach} positions; pass --max-model-len {reach} or less") as error:
        set_default_length(config)
    assert f"({rope['rope_type']})" in str(error.value)
    assert "--hf-overrides" in str(error.value)


@pytest.mark.parametrize(
    ("in_config", "overrides", "expected"),
    [
        (4096, {"rope_parameters": YARN}, 4096),
        (32768, {"rope_parameters": YARN, "max_position_embeddings": 32768}, 4096),
        (32768, {}, 32768),
    ],
    ids=["rotary embedding", "length too", "published"],
)
def test_train_length_with_scaled_rotary_embedding(in_config: int, overrides: dict[str, Any], expected: int) -> None:
    config = model_config(20000, in_config, overrides=overrides, rope_parameters=YARN)
    set_default_length(config)
    assert train_length(config.hf_text_config, LongMambaOptions()) == expected


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
