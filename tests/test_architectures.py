"""Tests of vllm_longmamba/architectures.py."""

from types import SimpleNamespace

import pytest

from vllm_longmamba.architectures import (
    DECIMAMBA,
    DECIMATED,
    is_mamba1,
    own_model_impl,
    stock_name,
    supported,
    supported_architecture,
    uses_longmamba,
    variant_name,
)
from vllm_longmamba.engine.registration import register_architectures

MAMBA1 = {"MambaForCausalLM", "FalconMambaForCausalLM", "JambaForCausalLM", "JambaForSequenceClassification"}


@pytest.mark.parametrize("architecture", supported())
def test_long_name(architecture: str) -> None:
    assert variant_name(architecture) == f"Long{architecture}"
    assert variant_name(variant_name(architecture)) == f"Long{architecture}"


@pytest.mark.parametrize("architecture", supported())
def test_stock_name(architecture: str) -> None:
    assert stock_name(f"Long{architecture}") == architecture
    assert stock_name(architecture) == architecture


@pytest.mark.parametrize("architecture", DECIMATED)
def test_names_of_decimamba(architecture: str) -> None:
    assert variant_name(architecture, DECIMAMBA) == f"Deci{architecture}"
    assert stock_name(f"Deci{architecture}") == architecture
    assert variant_name(f"Deci{architecture}") == f"Long{architecture}"
    assert supported_architecture([f"Deci{architecture}"], DECIMAMBA) == architecture


def test_a_name_of_vllm_that_begins_like_one_of_ours() -> None:
    assert stock_name("DeciLMForCausalLM") == "DeciLMForCausalLM"


def test_hybrids_are_not_decimated() -> None:
    with pytest.raises(
        ValueError, match=r"Zamba2ForCausalLM has no DeciMamba variant\. Supported are MambaForCausalLM, F"
    ):
        supported_architecture("Zamba2ForCausalLM", DECIMAMBA)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("MambaForCausalLM", "MambaForCausalLM"),
        (["LongMamba2ForCausalLM"], "Mamba2ForCausalLM"),
        (["SomethingElse", "Zamba2ForCausalLM"], "Zamba2ForCausalLM"),
    ],
    ids=["name", "variant", "second-of-two"],
)
def test_supported_architecture(given: str | list[str], expected: str) -> None:
    assert supported_architecture(given) == expected


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("LlamaForCausalLM", "LlamaForCausalLM"),
        (["A", "LongB"], "A / LongB"),
        ([], r"\(none\)"),
        (["NemotronH_Nano_VL_V2"], "NemotronH_Nano_VL_V2"),
    ],
    ids=["name", "two", "none", "images"],
)
def test_supported_architecture_refuses(given: str | list[str], named: str) -> None:
    with pytest.raises(ValueError, match=rf"architecture {named} has no LongMamba variant") as error:
        supported_architecture(given)
    assert all(architecture in str(error.value) for architecture in supported())
    assert "Leave --model-impl out" in str(error.value)


@pytest.mark.parametrize("architecture", supported())
def test_is_mamba1(architecture: str) -> None:
    assert is_mamba1(architecture) == (architecture in MAMBA1)
    assert is_mamba1(variant_name(architecture)) == (architecture in MAMBA1)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (SimpleNamespace(model_impl="longmamba"), True),
        (SimpleNamespace(model_impl="auto"), False),
        (SimpleNamespace(), False),
        (None, False),
    ],
    ids=["longmamba", "auto", "attribute-missing", "no-config"],
)
def test_uses_longmamba(config: object, expected: bool) -> None:
    assert uses_longmamba(config) is expected


@pytest.mark.parametrize(
    ("given", "expected"), [("longmamba", "longmamba"), ("decimamba", "decimamba"), ("vllm", None), (None, None)]
)
def test_own_model_impl(given: str | None, expected: str | None) -> None:
    assert own_model_impl(SimpleNamespace(model_impl=given)) == expected


def test_register_architectures() -> None:
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from vllm_longmamba.engine.config import LongMambaModelConfig
    from vllm_longmamba.engine.decimamba_config import DeciMambaModelConfig

    register_architectures()
    hooks = dict.fromkeys(map(variant_name, supported()), LongMambaModelConfig)
    hooks |= dict.fromkeys((variant_name(name, DECIMAMBA) for name in DECIMATED), DeciMambaModelConfig)
    first = {name: ModelRegistry.models[name] for name in hooks}
    register_architectures()
    for name, registered in first.items():
        assert ModelRegistry.models[name] is registered
        assert MODELS_CONFIG_MAP[name] is hooks[name]
