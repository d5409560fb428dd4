"""Makes the LongMamba variants of vLLM's model classes known to vLLM."""

from vllm_longmamba.architectures import SUPPORTED, variant_name


def register_architectures() -> None:
    """Put the LongMamba variants into vLLM's model registry and its table of per-architecture config hooks."""
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from vllm_longmamba.engine.config import LongMambaModelConfig

    known = ModelRegistry.get_supported_archs()
    for architecture in SUPPORTED:
        name = variant_name(architecture)
        if name not in known:
            ModelRegistry.register_model(name, f"vllm_longmamba.engine.models:{name}")
        MODELS_CONFIG_MAP[name] = LongMambaModelConfig
