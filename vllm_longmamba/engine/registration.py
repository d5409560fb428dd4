"""Makes this plugin's variants of vLLM's model classes known to vLLM."""

from vllm_longmamba.architectures import DECIMAMBA, MODEL_IMPL, supported_by, variant_name

_MODULES = {MODEL_IMPL: "vllm_longmamba.engine.models", DECIMAMBA: "vllm_longmamba.engine.decimamba_models"}


def register_architectures() -> None:
    """Put the variants into vLLM's model registry and its table of per-architecture config hooks."""
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from vllm_longmamba.engine.config import LongMambaModelConfig
    from vllm_longmamba.engine.decimamba_config import DeciMambaModelConfig

    hooks = {MODEL_IMPL: LongMambaModelConfig, DECIMAMBA: DeciMambaModelConfig}
    known = ModelRegistry.get_supported_archs()
    for model_impl, hook in hooks.items():
        for architecture in supported_by(model_impl):
            name = variant_name(architecture, model_impl)
            if name not in known:
                ModelRegistry.register_model(name, f"{_MODULES[model_impl]}:{name}")
            MODELS_CONFIG_MAP[name] = hook
