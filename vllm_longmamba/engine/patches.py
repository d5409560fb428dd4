"""Every change to vLLM's own code, in one place.

vLLM has no public hook at these points. Each patch is applied once, is a wrapper that calls the original, does nothing
for models without a `--model-impl` of this plugin, and checks first that what it wraps is what it was written for.
"""

import sys
from collections.abc import Callable
from typing import Any

from vllm_longmamba.engine.patch import Patch


def apply_patches(*, in_worker: bool = False) -> None:
    """Apply the patches that every process needs, or those that a worker needs; a second call changes nothing.

    Raises:
        IncompatibleVllmError: a function of vLLM is not what its patch was written for.
    """
    for patch in PATCHES:
        if patch.in_worker == in_worker:
            patch.apply()


def _inspect_variant(original: Callable[..., Any]) -> Callable[..., Any]:
    def inspect_model_cls(self: Any, architectures: Any, model_config: Any) -> Any:
        from vllm_longmamba.architectures import own_model_impl, supported_architecture, variant_name
        from vllm_longmamba.engine.config import prepare_model_config, refuse_original_format

        model_impl = own_model_impl(model_config)
        if model_impl is None:
            refuse_original_format(model_config)
            return original(self, architectures, model_config)
        from vllm_longmamba.engine.drift import check_newer_vllm

        check_newer_vllm(PATCHES)
        architecture = supported_architecture(architectures, model_impl)
        prepare_model_config(model_config)
        # The variant differs from the stock class in nothing that vLLM inspects.
        info, _ = original(self, [architecture], model_config)
        return info, variant_name(architecture, model_impl)

    return inspect_model_cls


def _resolve_variant(original: Callable[..., Any]) -> Callable[..., Any]:
    def resolve_model_cls(self: Any, architectures: Any, model_config: Any) -> Any:
        from vllm_longmamba.architectures import own_model_impl, supported_architecture, variant_name

        model_impl = own_model_impl(model_config)
        if model_impl is None:
            return original(self, architectures, model_config)
        architecture = supported_architecture(architectures, model_impl)
        return original(self, [variant_name(architecture, model_impl)], model_config)

    return resolve_model_cls


def _expose_prompt_lengths(original: Callable[..., Any]) -> Callable[..., Any]:
    def _build_attention_metadata(self: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm_longmamba.architectures import own_model_impl

        if own_model_impl(self.model_config) is None:
            return original(self, *args, **kwargs)
        from vllm_longmamba.engine.prompt_lengths import shown_to_builders

        with shown_to_builders(self):
            return original(self, *args, **kwargs)

    return _build_attention_metadata


def _provide_table(original: Callable[..., Any]) -> Callable[..., Any]:
    def _initialize_kv_caches(self: Any, vllm_config: Any) -> Any:
        from vllm_longmamba.architectures import uses_longmamba

        kv_cache_config = original(self, vllm_config)
        if uses_longmamba(vllm_config.model_config):
            from vllm_longmamba.calibration.at_start import provide_table
            from vllm_longmamba.engine.prefix_cache import named_table

            made = provide_table(self.model_executor, vllm_config, kv_cache_config)
            self.longmamba_table = made if made is not None else named_table(vllm_config)
        return kv_cache_config

    return _initialize_kv_caches


def _check_request(original: Callable[..., Any]) -> Callable[..., Any]:
    def preprocess_add_request(self: Any, request: Any) -> Any:
        from vllm_longmamba.architectures import DECIMAMBA, MODEL_IMPL, own_model_impl

        model_impl = own_model_impl(self.vllm_config.model_config)
        if model_impl == MODEL_IMPL:
            from vllm_longmamba.engine.prefix_cache import salt_request
            from vllm_longmamba.engine.prompt_lengths import keep_prompt_length

            keep_prompt_length(request)
            salt_request(self.vllm_config, request, self.longmamba_table)
        elif model_impl == DECIMAMBA:
            from vllm_longmamba.engine.decimamba_config import refuse_request

            refuse_request(self.vllm_config, request)
        return original(self, request)

    return preprocess_add_request


def _check_reload(original: Callable[..., Any]) -> Callable[..., Any]:
    def reload_weights(self: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm_longmamba.architectures import uses_longmamba

        if uses_longmamba(self.vllm_config.model_config):
            from vllm_longmamba.engine.reload import check_reload

            check_reload(self.vllm_config, *args, **kwargs)
        return original(self, *args, **kwargs)

    return reload_weights


def _default_to_whole_prompts(original: Callable[..., Any]) -> Callable[..., Any]:
    def _set_default_chunked_prefill_and_prefix_caching_args(self: Any, model_config: Any) -> Any:
        from vllm_longmamba.architectures import DECIMAMBA, own_model_impl
        from vllm_longmamba.decimamba_options import options_from_config

        is_default = self.enable_chunked_prefill is None
        result = original(self, model_config)
        if is_default and own_model_impl(model_config) == DECIMAMBA:
            # If False, vLLM then raises max_num_batched_tokens to max_model_len, or refuses a smaller one.
            self.enable_chunked_prefill = options_from_config(self.additional_config).cut_prompts
        return result

    return _set_default_chunked_prefill_and_prefix_caching_args


def _separate_generated_blocks(original: Callable[..., Any]) -> Callable[..., Any]:
    def generate_block_hash_extra_keys(
        request: Any, start_token_idx: int, end_token_idx: int, start_mm_idx: int
    ) -> tuple[tuple[Any, ...] | None, int]:
        from vllm_longmamba.engine.prefix_cache import unfiltered_block_keys

        keys, next_mm_idx = original(request, start_token_idx, end_token_idx, start_mm_idx)
        own = unfiltered_block_keys(request, end_token_idx)
        return ((*(keys or ()), *own) if own else keys), next_mm_idx

    return generate_block_hash_extra_keys


def _stop_before_end(original: Callable[..., Any]) -> Callable[..., Any]:
    def _mamba_block_aligned_split(
        self: Any,
        request: Any,
        num_new_tokens: int,
        num_new_local_computed_tokens: int = 0,
        num_external_computed_tokens: int = 0,
    ) -> Any:
        from vllm_longmamba.engine.prefix_cache import next_chunk

        cached = (num_new_local_computed_tokens, num_external_computed_tokens)
        start = request.num_computed_tokens + sum(cached)
        num_new_tokens, is_last = next_chunk(self, request, start, num_new_tokens)
        return num_new_tokens if is_last else original(self, request, num_new_tokens, *cached)

    return _mamba_block_aligned_split


def _hide_llvmlite(original: Callable[..., Any]) -> Callable[..., Any]:
    def _rebind_kernels(overrides: Any) -> Any:
        hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "llvmlite"}
        try:
            return original(overrides)
        finally:
            sys.modules.update(hidden)

    return _rebind_kernels


PATCHES = (
    Patch(
        "vllm.engine.arg_utils",
        "EngineArgs",
        "_set_default_chunked_prefill_and_prefix_caching_args",
        ("self", "model_config"),
        _default_to_whole_prompts,
        "DeciMamba takes a prompt in one step; a model's config hook comes too late to tell a default from a choice",
    ),
    Patch(
        "vllm.triton_utils.dispatcher",
        None,
        "_rebind_kernels",
        ("overrides",),
        _hide_llvmlite,
        "on a CPU vLLM looks into every loaded module when an engine starts, and fails on one of llvmlite's, which "
        "numba brings in; a second engine in the process of a Mamba-1 model would not start",
    ),
    Patch(
        "vllm.model_executor.models.registry",
        "_ModelRegistry",
        "inspect_model_cls",
        ("self", "architectures", "model_config"),
        _inspect_variant,
        "vLLM takes any --model-impl but chooses no model class by one it does not know",
    ),
    Patch(
        "vllm.model_executor.models.registry",
        "_ModelRegistry",
        "resolve_model_cls",
        ("self", "architectures", "model_config"),
        _resolve_variant,
        "as above",
    ),
    Patch(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner",
        "_build_attention_metadata",
        ("self", "num_tokens", "num_reqs"),
        _expose_prompt_lengths,
        "model runner V1 passes prompt lengths on only for one kind of sliding-window attention (V2 has a public hook)",
        in_worker=True,
    ),
    Patch(
        "vllm.v1.engine.core",
        "EngineCore",
        "_initialize_kv_caches",
        ("self", "vllm_config"),
        _provide_table,
        "a model without a table is calibrated once it can run, before requests are taken: nothing is called there",
    ),
    Patch(
        "vllm.v1.engine.core",
        "EngineCore",
        "preprocess_add_request",
        ("self", "request"),
        _check_request,
        "a cached state depends on the table and on the prompt's row, which vLLM's block hashes do not contain; and "
        "DeciMamba has no log-probabilities of the prompt tokens that it drops, which a request can ask for",
    ),
    Patch(
        "vllm.v1.core.kv_cache_utils",
        None,
        "generate_block_hash_extra_keys",
        ("request", "start_token_idx", "end_token_idx", "start_mm_idx"),
        _separate_generated_blocks,
        "generated tokens and ends of prompts are not filtered: their blocks must not serve prompts that filter them",
    ),
    Patch(
        "vllm.v1.core.sched.scheduler",
        "Scheduler",
        "_mamba_block_aligned_split",
        ("self", "request", "num_new_tokens", "num_new_local_computed_tokens", "num_external_computed_tokens"),
        _stop_before_end,
        "vLLM keeps the state at a prompt's last block, where the unfiltered end has made it one of this length only",
    ),
    Patch(
        "vllm.v1.worker.gpu_worker",
        "Worker",
        "reload_weights",
        ("self", "args", "kwargs"),
        _check_reload,
        "thresholds belong to the weights, and vLLM loads any into a running model",
        in_worker=True,
    ),
)
