"""Everything of vLLM that the plugin leans on, by name, so that a new release of vLLM fails here, and says where.

When a line fails after an upgrade of vLLM: read what became of the thing, change the plugin, then the line. `used by`
names the file of vllm_longmamba/ to look at.
"""

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from vllm_longmamba.architectures import DECIMATED, SUPPORTED
from vllm_longmamba.engine.patches import PATCHES, Patch

MIXER1 = "vllm.model_executor.layers.mamba.mamba_mixer:MambaMixer"
MIXER2 = "vllm.model_executor.layers.mamba.mamba_mixer2:MambaMixer2"
MAMBA1 = "vllm.v1.attention.backends.mamba1_attn"
MAMBA2 = "vllm.v1.attention.backends.mamba2_attn"
MAMBA = "vllm.v1.attention.backends.mamba_attn"
STATE = "vllm.v1.worker.gpu.model_states.mamba_hybrid:MambaHybridModelState"

# What must exist: (module:name, used by).
SYMBOLS = [
    ("vllm:LLM", "calibrate.py"),
    ("vllm:SamplingParams", "calibrate.py"),
    ("vllm:LLM.collective_rpc", "calibrate.py"),
    ("vllm:LLM.get_tokenizer", "calibrate.py"),
    ("vllm.version:__version__", "compatibility.py"),
    ("vllm.plugins:load_general_plugins", "plugin.py, as the entry point vllm.general_plugins"),
    ("vllm.model_executor.models:ModelRegistry.register_model", "architectures.py"),
    ("vllm.model_executor.models:ModelRegistry.get_supported_archs", "architectures.py"),
    ("vllm.model_executor.models.config:MODELS_CONFIG_MAP", "architectures.py, engine_config.py"),
    ("vllm.model_executor.models.config:MambaModelConfig.verify_and_update_config", "engine_config.py"),
    ("vllm.model_executor.models.config:VerifyAndUpdateConfig.verify_and_update_model_config", "engine_config.py"),
    ("vllm.model_executor.custom_op:op_registry_oot", "models.py"),
    ("vllm.model_executor.models.utils:WeightsMapper.__or__", "models.py"),
    ("vllm.model_executor.models.mamba:MambaForCausalLM.hf_to_vllm_mapper", "models.py"),
    ("vllm.model_executor.models.mamba2:Mamba2ForCausalLM.hf_to_vllm_mapper", "models.py"),
    ("vllm.distributed.parallel_state:get_tensor_model_parallel_rank", "models.py, calibration_worker.py"),
    ("vllm.distributed.parallel_state:get_tensor_model_parallel_world_size", "models.py"),
    ("vllm.distributed.parallel_state:get_world_group", "calibration_worker.py"),
    ("vllm.v1.worker.gpu_worker:Worker.get_model", "calibration_worker.py"),
    ("vllm.config:SchedulerConfig.get_scheduler_cls", "calibrate_at_start.py"),
    ("vllm.v1.core.sched.scheduler:Scheduler.has_requests", "calibrate_at_start.py"),
    ("vllm.v1.core.sched.scheduler:Scheduler.has_unfinished_requests", "calibrate_at_start.py"),
    ("vllm.v1.core.sched.scheduler:Scheduler.shutdown", "calibrate_at_start.py"),
    ("vllm.config:ModelConfig.is_moe", "calibrate_at_start.py"),
    ("vllm.config:VllmConfig.num_speculative_tokens", "long_mixer.py"),
    ("vllm.forward_context:get_forward_context", "mixer1.py, mixer2.py"),
    ("vllm.model_executor.layers.mamba.mamba_utils:is_conv_state_dim_first", "long_mixer.py"),
    (f"{MIXER1}._ssm_transform", "mixer1.py"),
    ("vllm.model_executor.layers.mamba.abstract:MambaBase.get_attn_backend", "mixer1.py, mixer2.py"),
    ("vllm.v1.attention.backends.utils:NULL_BLOCK_ID", "metadata.py"),
    (f"{MAMBA1}:Mamba1AttentionBackend.get_builder_cls", "metadata.py"),
    (f"{MAMBA2}:Mamba2AttentionBackend.get_builder_cls", "metadata.py"),
    (f"{MAMBA1}:Mamba1AttentionMetadataBuilder.metadata_cls", "metadata.py"),
    (f"{MAMBA2}:Mamba2AttentionMetadataBuilder.metadata_cls", "metadata.py"),
    ("vllm.config.compilation:CUDAGraphMode.has_full_cudagraphs", "metadata.py"),
    ("vllm.v1.core.sched.output:NewRequestData.prompt_len", "model_state.py"),
    ("vllm.transformers_utils.config:HFConfigParser", "checkpoint_config.py"),
    ("vllm.model_executor.model_loader.default_loader:DefaultModelLoader", "table_lookup.py"),
]

# Of DeciMamba.
SYMBOLS += [
    (f"{MIXER1.partition(':')[0]}:mamba_mixer", "decimated_mamba2.py, as the custom op of a whole layer"),
    ("vllm.model_executor.layers.mamba.mamba_mixer2:Mixer2RMSNormGated.forward_cuda", "decimated_mamba2.py"),
    ("vllm.model_executor.layers.mamba.mamba_mixer2:Mixer2RMSNormGated.forward_native", "decimated_mamba2.py"),
]

# Leading parameters, in order: (module:name, parameters, used by).
SIGNATURES = [
    (f"{MIXER1}.forward_impl", "self hidden_states output", "mixer1.py overrides it"),
    (f"{MIXER2}.get_kv_cache_spec", "self vllm_config", "mixer2.py overrides it"),
    ("vllm.model_executor.layers.mamba.abstract:MambaBase.get_kv_cache_spec", "self vllm_config", "mixer2.py"),
    (f"{MIXER1}._ssm_transform", "self x", "mixer1.py"),
    (f"{MIXER1}._time_proj_bias", "self", "mixer1.py"),
    (f"{MIXER2}.conv_ssm_forward", "self projected_states output", "mixer2.py overrides it"),
    (
        f"{MAMBA1}:Mamba1AttentionMetadataBuilder.__init__",
        "self kv_cache_spec layer_names vllm_config device",
        "metadata.py",
    ),
    (
        f"{MAMBA2}:Mamba2AttentionMetadataBuilder.__init__",
        "self kv_cache_spec layer_names vllm_config device",
        "metadata.py",
    ),
    (
        f"{MAMBA1}:Mamba1AttentionMetadataBuilder.build",
        "self common_prefix_len common_attn_metadata fast_build",
        "metadata.py overrides it",
    ),
    (
        f"{MAMBA2}:Mamba2AttentionMetadataBuilder.build",
        "self common_prefix_len common_attn_metadata fast_build",
        "metadata.py overrides it",
    ),
    (
        f"{MAMBA}:BaseMambaAttentionMetadataBuilder.update_block_table",
        "self metadata blk_table slot_mapping",
        "metadata.py overrides it",
    ),
    (
        f"{MAMBA}:BaseMambaAttentionMetadataBuilder._update_metadata_for_cudagraph_capture",
        "self metadata",
        "metadata.py overrides it; tests/test_metadata.py compares what it makes",
    ),
    (
        "vllm.v1.attention.backends.utils:mamba_get_block_table_tensor",
        "block_table seq_lens kv_cache_spec mamba_cache_mode",
        "metadata.py",
    ),
    (f"{STATE}.__init__", "self vllm_config model encoder_cache device", "model_state.py overrides it"),
    (f"{STATE}.add_request", "self req_index new_req_data", "model_state.py overrides it"),
    (
        f"{STATE}.prepare_attn",
        "self input_batch cudagraph_mode block_tables slot_mappings attn_groups",
        "model_state.py",
    ),
    (
        "vllm.model_executor.layers.mamba.ops.causal_conv1d:causal_conv1d_fn",
        "x weight bias conv_states query_start_loc cache_indices has_initial_state activation",
        "mixer1.py",
    ),
    (
        "vllm.model_executor.layers.mamba.ops.causal_conv1d:causal_conv1d_update",
        "x conv_state weight bias activation conv_state_indices",
        "long_mixer.py",
    ),
    (
        "vllm.model_executor.layers.mamba.ops.ssu_dispatch:selective_state_update",
        "state x dt A B C D dt_bias z dt_softplus state_batch_indices dst_state_batch_indices",
        "mixer1.py",
    ),
    ("vllm.utils.torch_utils:async_tensor_h2d", "data device dtype", "metadata.py"),
    ("vllm.utils.torch_utils:set_random_seed", "seed", "calibration_worker.py"),
    ("vllm.v1.request:Request.__init__", "self request_id prompt_token_ids sampling_params", "calibrate_at_start.py"),
    ("vllm.v1.core.sched.scheduler:Scheduler.schedule", "self", "calibrate_at_start.py"),
    (
        "vllm.v1.core.sched.scheduler:Scheduler.update_from_output",
        "self scheduler_output model_runner_output",
        "calibrate_at_start.py",
    ),
    (
        "vllm.v1.core.kv_cache_utils:resolve_kv_cache_block_sizes",
        "kv_cache_config vllm_config",
        "calibrate_at_start.py",
    ),
    (
        "vllm.v1.core.kv_cache_utils:get_request_block_hasher",
        "hash_block_size caching_hash_fn",
        "calibrate_at_start.py",
    ),
    ("vllm.v1.core.kv_cache_utils:init_none_hash", "hash_fn", "calibrate_at_start.py"),
    ("vllm.v1.structured_output:StructuredOutputManager.__init__", "self vllm_config", "calibrate_at_start.py"),
    ("vllm.tokenizers:cached_tokenizer_from_config", "model_config", "calibrate_at_start.py"),
    (
        "vllm.model_executor.model_loader.default_loader:DefaultModelLoader._prepare_weights",
        "self model_name_or_path subfolder revision fall_back_to_pt allow_patterns_overrides",
        "table_lookup.py",
    ),
    (
        "vllm.transformers_utils.config:HFConfigParser.parse",
        "self model trust_remote_code revision code_revision",
        "checkpoint_config.py overrides it",
    ),
    ("vllm.transformers_utils.config:register_config_parser", "config_format", "checkpoint_config.py"),
    ("vllm.transformers_utils.config:get_config_parser", "config_format", "checkpoint_config.py"),
    ("vllm.transformers_utils.config:get_config", "model trust_remote_code revision", "calibrate.py"),
    (
        "vllm.transformers_utils.repo_utils:list_filtered_repo_files",
        "model_name_or_path allow_patterns revision",
        "table_lookup.py",
    ),
    ("vllm.transformers_utils.repo_utils:file_or_path_exists", "model config_name revision", "engine_config.py"),
]

# Of DeciMamba.
SIGNATURES += [
    (f"{MIXER2}.forward", "self hidden_states mup_vector", "decimated_mamba2.py overrides it"),
    ("vllm.distributed:tensor_model_parallel_all_reduce", "input_", "decimated_mixer.py"),
    (
        f"{MAMBA}:BaseMambaAttentionMetadataBuilder._compute_chunk_metadata",
        "chunk_size num_prefills num_computed_tokens_p_cpu query_start_loc_p_cpu",
        "decimated_metadata.py",
    ),
    (
        "vllm.v1.attention.backends.utils:compute_causal_conv1d_metadata",
        "query_start_loc_p_cpu device",
        "decimated_metadata.py",
    ),
]

# Parameters that must be accepted somewhere: (module:name, parameters, used by).
KEYWORDS = [
    ("vllm.v1.worker.gpu_model_runner:GPUModelRunner.reload_weights", "weights_iterator weights_path", "reload.py"),
    ("vllm.v1.worker.gpu.model_runner:GPUModelRunner.reload_weights", "weights_iterator weights_path", "reload.py"),
    ("vllm.model_executor.layers.mamba.ops.causal_conv1d:causal_conv1d_fn", "metadata", "mixer1.py"),
    ("vllm.model_executor.layers.mamba.ops.ssu_dispatch:selective_state_update", "out", "mixer1.py"),
    (f"{STATE}.prepare_attn", "for_capture", "model_state.py"),
    (
        "vllm.v1.core.sched.scheduler:Scheduler.__init__",
        "vllm_config kv_cache_config structured_output_manager block_size hash_block_size",
        "calibrate_at_start.py",
    ),
    ("vllm.v1.request:Request.__init__", "block_hasher", "calibrate_at_start.py"),
    ("vllm.v1.executor:Executor.collective_rpc", "method args", "calibrate_at_start.py"),
]

# Fields of vLLM's dataclasses and structs: (module:class, fields, used by).
FIELDS = [
    (
        "vllm.config:ModelConfig",
        "model model_impl tokenizer tokenizer_revision skip_tokenizer_init revision max_model_len hf_config "
        "hf_text_config",
        "engine_config.py, model_length.py, table_lookup.py",
    ),
    (
        "vllm.config.model_arch:ModelArchitectureConfig",
        "derived_max_model_len_and_key rswa_window",
        "model_length.py, patches.py",
    ),
    (
        "vllm.config:VllmConfig",
        "additional_config model_config cache_config load_config compilation_config speculative_config "
        "weight_transfer_config",
        "engine_config.py, models.py",
    ),
    ("vllm.config:VllmConfig", "mamba_config scheduler_config", "long_mixer.py"),
    ("vllm.config:SchedulerConfig", "max_num_batched_tokens max_num_seqs", "long_mixer.py"),
    ("vllm.config.mamba:MambaConfig", "backend enable_stochastic_rounding", "long_mixer.py"),
    (
        "vllm.config:CacheConfig",
        "enable_prefix_caching use_replayssm",
        "engine_config.py, prefix_cache.py",
    ),
    ("vllm.config:LoadConfig", "load_format", "table_lookup.py"),
    ("vllm.config:CompilationConfig", "static_forward_context cudagraph_mode", "metadata.py"),
    (
        "vllm.v1.attention.backend:CommonAttentionMetadata",
        "num_reqs query_start_loc_cpu rswa_prefix_lens seq_lens_cpu_upper_bound is_prefilling",
        "prompt_filter.py",
    ),
    (
        f"{MAMBA1}:Mamba1AttentionMetadata",
        "num_prefills num_prefill_tokens num_decodes num_decode_tokens has_initial_states_p query_start_loc_p "
        "state_indices_tensor_p state_indices_tensor_d",
        "long_mixer.py, metadata.py",
    ),
    (
        f"{MAMBA2}:Mamba2AttentionMetadata",
        "num_prefills num_prefill_tokens num_decodes num_decode_tokens",
        "long_mixer.py, metadata.py",
    ),
    (
        "vllm.v1.worker.gpu.input_batch:InputBatch",
        "num_reqs num_reqs_after_padding idx_mapping_np prompt_lens is_prefilling_np",
        "model_state.py",
    ),
    ("vllm.v1.engine:EngineCoreRequest", "prompt_token_ids prompt_embeds cache_salt", "prefix_cache.py"),
    ("vllm.engine.arg_utils:EngineArgs", "worker_extension_cls model_impl additional_config", "calibrate.py"),
    ("vllm:SamplingParams", "max_tokens temperature skip_reading_prefix_cache", "calibrate_at_start.py"),
    ("vllm.config:VllmConfig", "kv_events_config kv_transfer_config parallel_config", "calibrate_at_start.py"),
    (
        "vllm.config:ParallelConfig",
        "data_parallel_size distributed_executor_backend",
        "calibrate_at_start.py",
    ),
]

# Of DeciMamba.
FIELDS += [
    (
        "vllm.config:SchedulerConfig",
        "enable_chunked_prefill long_prefill_token_threshold max_num_scheduled_tokens",
        "decimamba_config.py",
    ),
    ("vllm.config:ParallelConfig", "pipeline_parallel_size", "decimamba_config.py"),
    ("vllm.engine.arg_utils:EngineArgs", "enable_chunked_prefill", "patches.py"),
    ("vllm:SamplingParams", "prompt_logprobs", "decimamba_config.py"),
    ("vllm.v1.engine:EngineCoreRequest", "sampling_params resumable", "decimamba_config.py"),
    (
        f"{MAMBA2}:Mamba2AttentionMetadata",
        "nums_dict batch_ptr token_chunk_offset_ptr cu_chunk_seqlen_p seq_idx_p last_chunk_indices_p",
        "decimated_metadata.py",
    ),
]

# What a function must still do, looked up in its source: (module:name, pattern, what the plugin counts on, used by).
SOURCES = [
    (
        f"{MIXER2}.__init__",
        r"self\.tped_dt_size = self\.num_heads // self\.tp_size",
        "dt has one column per head",
        "long_mixer.py",
    ),
    (f"{MIXER2}.__init__", r"self\.dt_bias = nn\.Parameter", "the mixer owns its dt_bias", "mixer2.py"),
    (f"{MIXER2}.__init__", r"self\.A = nn\.Parameter\(", "A (nheads of this rank,)", "mixer2.py"),
    (
        f"{MIXER2}.conv_ssm_forward",
        r"projected_states\[\.\.\., self\.tped_intermediate_size :\],\s+\[self\.tped_conv_size, self\.tped_dt_size\]",
        "the raw dt is the last columns of projected_states",
        "long_mixer.py",
    ),
    (f"{MIXER2}.conv_ssm_forward", r"dt_softplus=True", "softplus(-inf) = 0 is left to the kernels", "mixer2.py"),
    (
        f"{MIXER2}.forward",
        r"torch\.ops\.vllm\.mamba_mixer2|conv_ssm_forward",
        "the layer runs conv_ssm_forward",
        "long_mixer.py",
    ),
    (
        f"{MIXER1}.forward",
        r"torch\.ops\.vllm\.mamba_mixer\(",
        "the layer runs forward_impl by a custom op",
        "long_mixer.py",
    ),
    (
        f"{MIXER1}.forward_impl",
        r"hidden_states_BC, gate = projected_states\.chunk\(2",
        "in_proj gives x, then z",
        "long_mixer.py",
    ),
    (
        f"{MIXER1}._ssm_transform",
        r"self\.dt_proj\(time_step\)\[0\]\.transpose\(-2, -1\)",
        "dt comes without its bias, transposed",
        "long_mixer.py",
    ),
    (
        f"{MIXER1}._ssm_transform",
        r"\[self\.time_step_rank, self\.ssm_state_size, self\.ssm_state_size\]",
        "x_proj gives dt of low rank, B and C",
        "mamba1.py",
    ),
    (
        f"{MIXER1}._ssm_transform",
        r"= self\.dt_layernorm\(time_step\.contiguous\(\)\)",
        "norms come between x_proj and dt_proj",
        "mamba1.py",
    ),
    (f"{MIXER1}.__init__", r"self\.kv_cache = \(torch", "kv_cache is (conv_state, ssm_state)", "mixer1.py"),
    (f"{MIXER1}.__init__", r"skip_bias_add=True", "dt_proj leaves its bias to the scan", "mixer1.py"),
    (
        f"{MIXER1}.__init__",
        r"static_forward_context\[prefix\] = self",
        "the builder finds its layer by name",
        "metadata.py",
    ),
    (
        f"{MIXER2}.__init__",
        r"static_forward_context\[prefix\] = self",
        "the builder finds its layer by name",
        "metadata.py",
    ),
    (
        f"{MAMBA}:BaseMambaAttentionMetadataBuilder.__init__",
        r"self\.decode_cudagraph_max_bs",
        "size of a graph's buffers",
        "metadata.py",
    ),
    (
        f"{MAMBA}:BaseMambaAttentionMetadataBuilder.__init__",
        r"self\.compilation_config = ",
        "cudagraph_mode",
        "metadata.py",
    ),
    (
        f"{MAMBA}:BaseMambaAttentionMetadataBuilder._compute_common_metadata",
        r"self\.metadata_cls\(",
        "our metadata class is built",
        "metadata.py",
    ),
    (
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner._build_attention_metadata",
        r"if self\.model_config\.rswa_window is not None:\s+rswa_prefix_lens = num_prompt_tokens_cpu",
        "runner V1 passes prompt lengths on where rswa_window is set",
        "patches.py",
    ),
    (
        f"{STATE}.prepare_attn",
        r"rswa_prefix_lens=input_batch\.prompt_lens",
        "runner V2 passes prompt_lens on",
        "model_state.py",
    ),
    (
        "vllm.v1.worker.gpu.model_states",
        r'hasattr\(model, "get_model_state_cls"\)',
        "runner V2 asks the model",
        "models.py",
    ),
    (
        "vllm.v1.worker.gpu.model_states.default:DefaultModelState.__init__",
        r"self\.max_num_reqs",
        "slots of requests",
        "model_state.py",
    ),
    (
        "vllm.model_executor.model_loader.default_loader:DefaultModelLoader.get_all_weights",
        r'getattr\(model, "allow_patterns_overrides", None\)',
        "a model may choose its weight files",
        "models.py",
    ),
    (
        "vllm.model_executor.model_loader.default_loader:DefaultModelLoader._prepare_weights",
        r"return hf_folder, hf_weights_files, use_safetensors, index_file",
        "four values come back",
        "table_lookup.py",
    ),
    (
        "vllm.model_executor.custom_op:PluggableLayer",
        r"op_registry_oot\[layer_class_name\]",
        "layers are replaced by name",
        "models.py",
    ),
    (
        "vllm.v1.core.kv_cache_utils:get_request_block_hasher",
        r"generate_block_hash_extra_keys\(",
        "block hashes take our keys",
        "patches.py",
    ),
    (
        "vllm.v1.core.kv_cache_utils:generate_block_hash_extra_keys",
        r'"cache_salt", request\.cache_salt',
        "the salt is hashed",
        "prefix_cache.py",
    ),
    (
        "vllm.v1.request:Request.__init__",
        r"self\.num_prompt_tokens = ",
        "the original prompt length is kept",
        "prefix_cache.py",
    ),
    (
        "vllm.config:ModelConfig.__post_init__",
        r"self\.model_arch_config = ",
        "lengths are derived once",
        "model_length.py",
    ),
    ("vllm.v1.engine.core:EngineCore.__init__", r"self\.vllm_config = ", "the core knows the options", "patches.py"),
    (
        "vllm.v1.engine.core:EngineCore.__init__",
        r"load_general_plugins\(\)[\s\S]*self\._initialize_kv_caches\(vllm_config\)",
        "the cache is set up after the plugins are loaded, and before requests are taken",
        "patches.py",
    ),
    (
        "vllm.v1.engine.core:EngineCore._initialize_kv_caches",
        r"self\.model_executor\.compile_or_warm_up_model\(\)[\s\S]*return scheduler_kv_cache_config",
        "the model can run when the method returns, which gives the scheduler's view of the cache",
        "patches.py",
    ),
    (
        "vllm.v1.engine.core:EngineCore.step",
        r"model_output = future\.result\(\)\s+if model_output is None:\s+"
        r"model_output = self\.model_executor\.sample_tokens\(grammar_output\)",
        "a step: schedule, execute, sample, update",
        "calibrate_at_start.py",
    ),
    (
        "vllm.config:VllmConfig.try_verify_and_update_config",
        r"MODELS_CONFIG_MAP\.get\(architecture",
        "our hook is called",
        "engine_config.py",
    ),
    (
        "vllm.v1.worker.worker_base:WorkerWrapperBase",
        r"worker_class\.__bases__ = worker_class\.__bases__ \+ \(\s*worker_extension_cls",
        "the calibration's methods join the worker",
        "calibration_worker.py",
    ),
]

# Of DeciMamba.
SOURCES += [
    (
        "vllm.v1.core.sched.scheduler:Scheduler.schedule",
        r"not self\.scheduler_config\.enable_chunked_prefill\s+and num_new_tokens > request_token_budget",
        "without chunked prefill a prompt waits until it fits a step",
        "decimamba_config.py",
    ),
    (
        "vllm.engine.arg_utils:EngineArgs._set_default_max_num_seqs_and_batched_tokens_args",
        r"if not self\.enable_chunked_prefill:[\s\S]{0,200}max\(\s*model_config\.max_model_len",
        "without chunked prefill a step takes max_model_len tokens by default",
        "patches.py",
    ),
    (
        "vllm.config:SchedulerConfig.verify_max_model_len",
        r"self\.max_num_batched_tokens < max_model_len\s+and not self\.enable_chunked_prefill",
        "without chunked prefill fewer tokens are refused",
        "decimamba_config.py",
    ),
    (
        f"{MIXER2}.forward",
        r"gate = projected_states\[\.\.\., : self\.tped_intermediate_size\]\s+"
        r"hidden_states = self\.norm\(ssm_output, gate\)",
        "what follows conv_ssm_forward",
        "decimated_mamba2.py",
    ),
    (
        "vllm.config:VllmConfig.compute_hash",
        r"additional_config",
        "models compiled for other decimating layers are not taken",
        "decimated_mamba2.py",
    ),
]

# Every name that the plugin imports from vLLM, read from its sources, so that none is forgotten above.
SOURCE_FILES = sorted((Path(__file__).resolve().parent.parent / "vllm_longmamba").rglob("*.py"))
IMPORTS = sorted(
    {
        (f"{node.module}:{alias.name}", path.name)
        for path in SOURCE_FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "vllm"
        for alias in node.names
    }
)

# Models built on the mixers that are left out on purpose, with the reason.
EXCLUDED = {"JambaForSequenceClassification": "pooling model: it generates nothing"}


def resolve(target: str) -> Any:
    module, _, name = target.partition(":")
    found: Any = importlib.import_module(module)
    for part in filter(None, name.split(".")):
        assert hasattr(found, part), f"vLLM has no {target} any more ({part!r} is missing)"
        found = getattr(found, part)
    return found


def parameters_of(target: str) -> list[str]:
    function = resolve(target)
    # Our own wrapper, once the plugin is registered, has vLLM's function behind it.
    return list(inspect.signature(inspect.unwrap(function)).parameters)


def field_names(cls: type) -> set[str]:
    if dataclasses.is_dataclass(cls):
        return {field.name for field in dataclasses.fields(cls)}
    return set(cls.__struct_fields__)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("target", "used_by"), IMPORTS, ids=[f"{file}-{target}" for target, file in IMPORTS])
def test_import(target: str, used_by: str) -> None:
    assert resolve(target) is not None, f"{target}, imported by {used_by}, is None"


@pytest.mark.parametrize(("target", "used_by"), SYMBOLS, ids=[target for target, _ in SYMBOLS])
def test_symbol(target: str, used_by: str) -> None:
    assert resolve(target) is not None, f"{target}, used by {used_by}, is None"


@pytest.mark.parametrize(("target", "parameters", "used_by"), SIGNATURES, ids=[target for target, *_ in SIGNATURES])
def test_signature(target: str, parameters: str, used_by: str) -> None:
    expected, found = parameters.split(), parameters_of(target)
    assert found[: len(expected)] == expected, f"{target}, used by {used_by}, has other parameters: {found}"


@pytest.mark.parametrize(("target", "parameters", "used_by"), KEYWORDS, ids=[target for target, *_ in KEYWORDS])
def test_keyword(target: str, parameters: str, used_by: str) -> None:
    signature = inspect.signature(inspect.unwrap(resolve(target)))
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values())
    missing = set() if takes_any else set(parameters.split()) - set(signature.parameters)
    assert not missing, f"{target}, used by {used_by}, takes no {', '.join(sorted(missing))} any more"


@pytest.mark.parametrize(("target", "fields", "used_by"), FIELDS, ids=[target for target, *_ in FIELDS])
def test_fields(target: str, fields: str, used_by: str) -> None:
    missing = set(fields.split()) - field_names(resolve(target))
    assert not missing, f"{target}, used by {used_by}, has no field {', '.join(sorted(missing))} any more"


@pytest.mark.parametrize(
    ("target", "pattern", "meaning", "used_by"),
    SOURCES,
    ids=[f"{target}-{meaning}" for target, _, meaning, _ in SOURCES],
)
def test_source(target: str, pattern: str, meaning: str, used_by: str) -> None:
    found = resolve(target)
    source = inspect.getsource(inspect.unwrap(found) if callable(found) else found)
    assert re.search(pattern, source), f"{target} has changed; {used_by} counts on: {meaning} (pattern {pattern!r})"


@pytest.mark.parametrize("patch", PATCHES, ids=[patch.name for patch in PATCHES])
def test_patched_function(patch: Patch) -> None:
    target = f"{patch.module}:{patch.owner + '.' if patch.owner else ''}{patch.name}"
    assert tuple(parameters_of(target)[: len(patch.parameters)]) == patch.parameters, f"{target}, used by patches.py"


def test_mixers_can_be_replaced() -> None:
    from vllm.model_executor.custom_op import PluggableLayer

    for target in (MIXER1, MIXER2):
        assert issubclass(resolve(target), PluggableLayer), f"{target} is no PluggableLayer any more (models.py)"


def test_input_batch_can_be_copied() -> None:
    batch = resolve("vllm.v1.worker.gpu.input_batch:InputBatch")
    init = {field.name for field in dataclasses.fields(batch) if not field.init}
    assert not init, f"model_state.py copies InputBatch by dataclasses.replace, which cannot set {init}"


def models_on_mixers() -> dict[str, tuple[str, str]]:
    """Architectures of vLLM's registry whose module constructs one of the mixers, read without importing any."""
    from vllm.model_executor.models import registry

    found = {}
    for architecture, (module, class_name) in registry._VLLM_MODELS.items():
        full = module if "." in module else f"vllm.model_executor.models.{module}"
        spec = importlib.util.find_spec(full)
        assert spec is not None
        assert spec.origin is not None
        origin = Path(spec.origin)
        files = sorted(origin.parent.rglob("*.py")) if origin.name == "__init__.py" else [origin]
        if any(re.search(r"\bMambaMixer2?\(", path.read_text()) for path in files):
            found[architecture] = (module, class_name)
    return found


def test_every_model_on_the_mixers_is_supported() -> None:
    found = models_on_mixers()
    assert len(found) >= 8, f"vLLM no longer builds its models as the scan expects: {found}"
    assert set(EXCLUDED) <= set(found), "an architecture that is left out no longer exists: take it off EXCLUDED"
    expected = {name: place for name, place in found.items() if name not in EXCLUDED}
    assert expected == SUPPORTED, (
        "architectures.py: SUPPORTED is not the set of vLLM's models built on its Mamba mixers"
    )


@pytest.mark.parametrize("architecture", SUPPORTED)
def test_variant_of_every_supported_model(architecture: str) -> None:
    from vllm_longmamba.engine import decimamba_models, models

    module, class_name = SUPPORTED[architecture]
    stock = resolve(f"vllm.model_executor.models.{module}:{class_name}")
    variant = getattr(models, f"Long{architecture}")
    assert issubclass(variant, models.LongMambaModel)
    assert issubclass(variant, stock)
    if architecture in DECIMATED:
        assert issubclass(getattr(decimamba_models, f"Deci{architecture}"), decimamba_models.DeciMambaModel)
        assert issubclass(getattr(decimamba_models, f"Deci{architecture}"), stock)
    assert {"vllm_config", "prefix"} <= set(inspect.signature(stock.__init__).parameters)
    assert "weights" in inspect.signature(stock.load_weights).parameters
