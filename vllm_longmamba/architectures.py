"""The vLLM model classes that have a variant of this plugin's, and the names of the variants."""

from functools import lru_cache
from typing import Any

MODEL_IMPL = "longmamba"
DECIMAMBA = "decimamba"
# The plugin's values of --model-impl, and what the names of their variants begin with.
PREFIXES = {MODEL_IMPL: "Long", DECIMAMBA: "Deci"}

# vLLM's modules that build models of MambaMixer or MambaMixer2. Every architecture that vLLM's registry finds in one of
# them has a variant. tests/test_vllm_drift.py looks for modules that are missing here.
_MAMBA1_MODULES = ("mamba", "jamba")
MODULES = (*_MAMBA1_MODULES, "mamba2", "zamba2", "nemotron_h", "falcon_h1", "granitemoehybrid")

# Decimated layers need a residual stream that nothing but Mamba layers adds to.
DECIMATED = ("MambaForCausalLM", "FalconMambaForCausalLM", "Mamba2ForCausalLM")


@lru_cache(maxsize=1)
def supported() -> dict[str, tuple[str, str]]:
    """Architecture, as config.json names it -> vLLM's module and class, for all that have a variant."""
    from vllm.model_executor.models.registry import _VLLM_MODELS

    return {name: (module, found) for name, (module, found) in _VLLM_MODELS.items() if module in MODULES}


def supported_by(model_impl: str) -> tuple[str, ...]:
    """The architectures that have a variant for one of the plugin's values of --model-impl."""
    return DECIMATED if model_impl == DECIMAMBA else tuple(supported())


def variant_name(architecture: str, model_impl: str = MODEL_IMPL) -> str:
    """Name of the variant of a vLLM architecture, e.g. "MambaForCausalLM" -> "LongMambaForCausalLM"."""
    return PREFIXES[model_impl] + stock_name(architecture)


def stock_name(architecture: str) -> str:
    """Name of the vLLM architecture that a variant extends; other names are returned as they are."""
    for prefix in PREFIXES.values():
        if architecture.removeprefix(prefix) in supported():
            return architecture.removeprefix(prefix)
    return architecture


def supported_architecture(architectures: str | list[str], model_impl: str = MODEL_IMPL) -> str:
    """The first architecture of a model that has a variant.

    Args:
        architectures: what config.json lists, stock names or names of variants.
        model_impl: the plugin's value of --model-impl that is asked for.

    Returns:
        The stock name.

    Raises:
        ValueError: none of them has one.
    """
    named = [architectures] if isinstance(architectures, str) else list(architectures)
    supported = supported_by(model_impl)
    for architecture in named:
        if stock_name(architecture) in supported:
            return stock_name(architecture)
    method = {MODEL_IMPL: "LongMamba", DECIMAMBA: "DeciMamba"}[model_impl]
    raise ValueError(
        f"--model-impl {model_impl}: the model's architecture {' / '.join(named) or '(none)'} has no {method} variant. "
        f"Supported are {', '.join(supported)}. Leave --model-impl out to serve this model with stock vLLM."
    )


def is_mamba1(architecture: str) -> bool:
    """Whether the layers of a supported architecture, stock or variant, are Mamba-1 (otherwise they are Mamba-2)."""
    return supported()[stock_name(architecture)][0] in _MAMBA1_MODULES


def own_model_impl(model_config: Any) -> str | None:
    """The plugin's value of --model-impl that a vLLM `ModelConfig` was made with; None for vLLM's own values."""
    given = getattr(model_config, "model_impl", None)
    return given if given in PREFIXES else None


def uses_longmamba(model_config: Any) -> bool:
    """Whether a vLLM `ModelConfig` was made with `--model-impl longmamba`."""
    return own_model_impl(model_config) == MODEL_IMPL
