"""The vLLM model classes that have a LongMamba variant, and the names of the variants."""

from typing import Any

MODEL_IMPL = "longmamba"
PREFIX = "Long"

# Architecture (as config.json names it) -> vLLM module and class, all built on MambaMixer or MambaMixer2.
# tests/test_vllm_drift.py compares this with the model classes of the installed vLLM.
SUPPORTED: dict[str, tuple[str, str]] = {
    "MambaForCausalLM": ("mamba", "MambaForCausalLM"),
    "FalconMambaForCausalLM": ("mamba", "MambaForCausalLM"),
    "Mamba2ForCausalLM": ("mamba2", "Mamba2ForCausalLM"),
    "Zamba2ForCausalLM": ("zamba2", "Zamba2ForCausalLM"),
    "JambaForCausalLM": ("jamba", "JambaForCausalLM"),
    "NemotronHForCausalLM": ("nemotron_h", "NemotronHForCausalLM"),
    "NemotronHPuzzleForCausalLM": ("nemotron_h", "NemotronHForCausalLM"),
    "FalconH1ForCausalLM": ("falcon_h1", "FalconH1ForCausalLM"),
    "GraniteMoeHybridForCausalLM": ("granitemoehybrid", "GraniteMoeHybridForCausalLM"),
}


def variant_name(architecture: str) -> str:
    """Name of the LongMamba variant of a vLLM architecture, e.g. "MambaForCausalLM" -> "LongMambaForCausalLM"."""
    return architecture if architecture.startswith(PREFIX) else PREFIX + architecture


def stock_name(architecture: str) -> str:
    """Name of the vLLM architecture that a LongMamba variant extends."""
    return architecture.removeprefix(PREFIX)


def supported_architecture(architectures: str | list[str]) -> str:
    """The first architecture of a model that has a LongMamba variant.

    Args:
        architectures: what config.json lists, stock names or names of variants.

    Returns:
        The stock name.

    Raises:
        ValueError: none of them is built on vLLM's Mamba mixers.
    """
    named = [architectures] if isinstance(architectures, str) else list(architectures)
    for architecture in named:
        if stock_name(architecture) in SUPPORTED:
            return stock_name(architecture)
    raise ValueError(
        f"--model-impl longmamba: the model's architecture {' / '.join(named) or '(none)'} has no LongMamba variant. "
        f"Supported are {', '.join(SUPPORTED)}. Leave --model-impl out to serve this model with stock vLLM."
    )


def is_mamba1(architecture: str) -> bool:
    """Whether the layers of a supported architecture, stock or variant, are Mamba-1 (otherwise they are Mamba-2)."""
    return SUPPORTED[stock_name(architecture)][0] in ("mamba", "jamba")


def uses_longmamba(model_config: Any) -> bool:
    """Whether a vLLM `ModelConfig` was made with `--model-impl longmamba`."""
    return getattr(model_config, "model_impl", None) == MODEL_IMPL
