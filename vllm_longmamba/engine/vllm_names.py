"""Names, parameters and fields of vLLM that the plugin leans on, beside what it imports; drift.py looks for them.

When one is gone after an upgrade of vLLM: read what became of it, change the plugin, then the line. The last part of
each line names the file of vllm_longmamba/ to look at.
"""

MIXER1 = "vllm.model_executor.layers.mamba.mamba_mixer:MambaMixer"
MIXER2 = "vllm.model_executor.layers.mamba.mamba_mixer2:MambaMixer2"
MAMBA1 = "vllm.v1.attention.backends.mamba1_attn"
MAMBA2 = "vllm.v1.attention.backends.mamba2_attn"
MAMBA = "vllm.v1.attention.backends.mamba_attn"
CHECKPOINT = "vllm.model_executor.layers.mamba.checkpoint"
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
    ("vllm.model_executor.models.config:MODELS_CONFIG_MAP", "architectures.py, config.py"),
    ("vllm.model_executor.models.config:MambaModelConfig.verify_and_update_config", "config.py"),
    ("vllm.model_executor.models.config:VerifyAndUpdateConfig.verify_and_update_model_config", "config.py"),
    ("vllm.model_executor.custom_op:op_registry_oot", "models.py"),
    ("vllm.model_executor.models.utils:WeightsMapper.__or__", "models.py"),
    ("vllm.model_executor.models.mamba:MambaForCausalLM.hf_to_vllm_mapper", "models.py"),
    ("vllm.model_executor.models.mamba2:Mamba2ForCausalLM.hf_to_vllm_mapper", "models.py"),
    ("vllm.distributed.parallel_state:get_tensor_model_parallel_rank", "models.py, worker.py"),
    ("vllm.distributed.parallel_state:get_tensor_model_parallel_world_size", "models.py"),
    ("vllm.distributed.parallel_state:get_world_group", "worker.py"),
    ("vllm.v1.worker.gpu_worker:Worker.get_model", "worker.py"),
    ("vllm.config:SchedulerConfig.get_scheduler_cls", "at_start.py"),
    ("vllm.v1.core.sched.scheduler:Scheduler.has_requests", "at_start.py"),
    ("vllm.v1.core.sched.scheduler:Scheduler.has_unfinished_requests", "at_start.py"),
    ("vllm.v1.core.sched.scheduler:Scheduler.shutdown", "at_start.py"),
    ("vllm.config:ModelConfig.is_moe", "at_start.py"),
    ("vllm.config:VllmConfig.num_speculative_tokens", "filtered_mixer.py"),
    ("vllm.config:VllmConfig.use_v2_model_runner", "refusals.py"),
    ("vllm.config:ModelConfig.is_hybrid", "refusals.py"),
    ("vllm.forward_context:get_forward_context", "mamba1.py, mamba2.py"),
    ("vllm.model_executor.layers.mamba.mamba_utils:is_conv_state_dim_first", "filtered_mixer.py"),
    (f"{MIXER2}._warmup_ssd_kernels", "mamba2.py overrides it"),
    (f"{MIXER1}._ssm_transform", "mamba1.py"),
    (f"{MIXER1.partition(':')[0]}:mamba_mixer", "mamba2.py, as the custom op of a whole layer"),
    ("vllm.model_executor.layers.mamba.abstract:MambaBase.get_attn_backend", "mamba1.py, mamba2.py"),
    ("vllm.v1.attention.backends.utils:NULL_BLOCK_ID", "step_metadata.py"),
    (f"{MAMBA1}:Mamba1AttentionBackend.get_builder_cls", "step_metadata.py"),
    (f"{MAMBA2}:Mamba2AttentionBackend.get_builder_cls", "step_metadata.py"),
    (f"{MAMBA1}:Mamba1AttentionMetadataBuilder.metadata_cls", "step_metadata.py"),
    (f"{MAMBA2}:Mamba2AttentionMetadataBuilder.metadata_cls", "step_metadata.py"),
    ("vllm.config.compilation:CUDAGraphMode.has_full_cudagraphs", "step_metadata.py"),
    ("vllm.v1.core.sched.output:NewRequestData.prompt_len", "model_state.py"),
    ("vllm.transformers_utils.config:HFConfigParser", "original_config.py"),
    ("vllm.model_executor.model_loader.default_loader:DefaultModelLoader", "table_lookup.py"),
    ("vllm.distributed.kv_transfer.kv_connector.factory:KVConnectorFactory.supports_hma_config", "refusals.py"),
    ("vllm.platforms:current_platform.is_cpu", "refusals.py"),
    ("vllm.config:VllmConfig._post_init_kv_transfer_config", "refusals.py"),
    ("vllm.config.mamba:MambaBackendEnum.FLASHINFER", "refusals.py"),
    (f"{MAMBA2}:Mamba2AttentionBackend.supports_device_cpu_query_lens_mismatch", "step_metadata.py overrides it"),
    # Of DeciMamba.
    ("vllm.model_executor.layers.mamba.mamba_mixer2:Mixer2RMSNormGated.forward_cuda", "decimated_mamba2.py"),
    ("vllm.model_executor.layers.mamba.mamba_mixer2:Mixer2RMSNormGated.forward_native", "decimated_mamba2.py"),
]

# Leading parameters, in order: (module:name, parameters, used by).
SIGNATURES = [
    (f"{MIXER1}.forward_impl", "self hidden_states output", "mamba1.py overrides it"),
    (f"{MIXER2}.get_kv_cache_spec", "self vllm_config", "mamba2.py overrides it"),
    ("vllm.model_executor.layers.mamba.abstract:MambaBase.get_kv_cache_spec", "self vllm_config", "mamba2.py"),
    (f"{MIXER1}._ssm_transform", "self x", "mamba1.py"),
    (f"{MIXER1}._time_proj_bias", "self", "mamba1.py"),
    (f"{MIXER2}.conv_ssm_forward", "self projected_states output", "mamba2.py overrides it"),
    (
        f"{MAMBA1}:Mamba1AttentionMetadataBuilder.__init__",
        "self kv_cache_spec layer_names vllm_config device",
        "step_metadata.py",
    ),
    (
        f"{MAMBA2}:Mamba2AttentionMetadataBuilder.__init__",
        "self kv_cache_spec layer_names vllm_config device",
        "step_metadata.py",
    ),
    (
        f"{MAMBA1}:Mamba1AttentionMetadataBuilder.build",
        "self common_prefix_len common_attn_metadata fast_build",
        "step_metadata.py overrides it",
    ),
    (
        f"{MAMBA2}:Mamba2AttentionMetadataBuilder.build",
        "self common_prefix_len common_attn_metadata fast_build",
        "step_metadata.py overrides it",
    ),
    (
        f"{MAMBA}:BaseMambaAttentionMetadataBuilder.update_block_table",
        "self metadata blk_table slot_mapping",
        "step_metadata.py overrides it",
    ),
    (
        f"{MAMBA}:BaseMambaAttentionMetadataBuilder._update_metadata_for_cudagraph_capture",
        "self metadata",
        "step_metadata.py overrides it; tests/layers/test_step_metadata.py compares what it makes",
    ),
    (
        "vllm.v1.attention.backends.utils:mamba_get_block_table_tensor",
        "block_table seq_lens kv_cache_spec mamba_cache_mode",
        "step_metadata.py",
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
        "mamba1.py",
    ),
    (
        "vllm.model_executor.layers.mamba.ops.causal_conv1d:causal_conv1d_update",
        "x conv_state weight bias activation conv_state_indices",
        "filtered_mixer.py",
    ),
    (
        "vllm.model_executor.layers.mamba.ops.ssu_dispatch:selective_state_update",
        "state x dt A B C D dt_bias z dt_softplus state_batch_indices dst_state_batch_indices",
        "mamba1.py",
    ),
    (
        "vllm.model_executor.layers.mamba.ops.ssd_checkpoint:store_prefill_checkpoint",
        "checkpoint chunk_idx x conv_state chunk_states ssm_state query_start_loc",
        "mamba2.py",
    ),
    ("vllm.utils.torch_utils:async_tensor_h2d", "data device dtype", "step_metadata.py"),
    ("vllm.utils.torch_utils:set_random_seed", "seed", "worker.py"),
    ("vllm.v1.request:Request.__init__", "self request_id prompt_token_ids sampling_params", "at_start.py"),
    ("vllm.v1.core.sched.scheduler:Scheduler.schedule", "self", "at_start.py"),
    (
        "vllm.v1.core.sched.scheduler:Scheduler.update_from_output",
        "self scheduler_output model_runner_output",
        "at_start.py",
    ),
    (
        "vllm.v1.core.kv_cache_utils:resolve_kv_cache_block_sizes",
        "kv_cache_config vllm_config",
        "at_start.py",
    ),
    (
        "vllm.v1.core.kv_cache_utils:get_request_block_hasher",
        "hash_block_size caching_hash_fn",
        "at_start.py",
    ),
    ("vllm.v1.core.kv_cache_utils:init_none_hash", "hash_fn", "at_start.py"),
    ("vllm.v1.structured_output:StructuredOutputManager.__init__", "self vllm_config", "at_start.py"),
    ("vllm.tokenizers:cached_tokenizer_from_config", "model_config", "at_start.py"),
    (
        "vllm.model_executor.model_loader.default_loader:DefaultModelLoader._prepare_weights",
        "self model_name_or_path subfolder revision fall_back_to_pt allow_patterns_overrides",
        "table_lookup.py",
    ),
    (
        "vllm.transformers_utils.config:HFConfigParser.parse",
        "self model trust_remote_code revision code_revision",
        "original_config.py overrides it",
    ),
    ("vllm.transformers_utils.config:register_config_parser", "config_format", "original_config.py"),
    ("vllm.transformers_utils.config:get_config_parser", "config_format", "original_config.py"),
    ("vllm.transformers_utils.config:get_config", "model trust_remote_code revision", "calibrate.py"),
    (
        "vllm.transformers_utils.repo_utils:list_filtered_repo_files",
        "model_name_or_path allow_patterns revision",
        "table_lookup.py",
    ),
    ("vllm.transformers_utils.repo_utils:file_or_path_exists", "model config_name revision", "config.py"),
    (f"{MIXER2}.forward", "self hidden_states mup_vector", "mamba2.py overrides it"),
    # Of DeciMamba.
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
    ("vllm.model_executor.layers.mamba.ops.causal_conv1d:causal_conv1d_fn", "metadata", "mamba1.py"),
    ("vllm.model_executor.layers.mamba.ops.ssu_dispatch:selective_state_update", "out", "mamba1.py"),
    ("vllm.model_executor.layers.mamba.ops.ssd_checkpoint:store_prefill_checkpoint", "state_len", "mamba2.py"),
    (f"{STATE}.prepare_attn", "for_capture", "model_state.py"),
    (
        "vllm.v1.core.sched.scheduler:Scheduler.__init__",
        "vllm_config kv_cache_config structured_output_manager block_size hash_block_size",
        "at_start.py",
    ),
    ("vllm.v1.request:Request.__init__", "block_hasher", "at_start.py"),
    ("vllm.v1.executor:Executor.collective_rpc", "method args", "at_start.py"),
]

# Fields of vLLM's dataclasses and structs: (module:class, fields, used by).
FIELDS = [
    (
        "vllm.config:ModelConfig",
        "model model_impl tokenizer tokenizer_revision skip_tokenizer_init revision max_model_len hf_config "
        "hf_text_config",
        "config.py, train_length.py, table_lookup.py",
    ),
    (
        "vllm.config.model_arch:ModelArchitectureConfig",
        "derived_max_model_len_and_key rswa_window",
        "train_length.py, patches.py",
    ),
    (
        "vllm.config:VllmConfig",
        "additional_config model_config cache_config load_config compilation_config speculative_config "
        "weight_transfer_config",
        "config.py, models.py, refusals.py",
    ),
    ("vllm.config:VllmConfig", "mamba_config scheduler_config", "filtered_mixer.py"),
    ("vllm.config:SchedulerConfig", "max_num_batched_tokens max_num_seqs", "filtered_mixer.py"),
    ("vllm.config.mamba:MambaConfig", "backend enable_stochastic_rounding", "filtered_mixer.py"),
    (
        "vllm.config:CacheConfig",
        "enable_prefix_caching mamba_cache_mode use_replayssm",
        "filtered_mixer.py, mamba2.py, prefix_cache.py",
    ),
    ("vllm.config:LoadConfig", "load_format", "table_lookup.py"),
    ("vllm.config:CompilationConfig", "static_forward_context cudagraph_mode", "step_metadata.py"),
    (
        "vllm.v1.attention.backend:CommonAttentionMetadata",
        "num_reqs query_start_loc_cpu rswa_prefix_lens seq_lens_cpu_upper_bound is_prefilling",
        "prompt_filter.py",
    ),
    (
        f"{MAMBA1}:Mamba1AttentionMetadata",
        "num_prefills num_prefill_tokens num_decodes num_decode_tokens has_initial_states_p query_start_loc_p "
        "state_indices_tensor_p state_indices_tensor_d",
        "filtered_mixer.py, step_metadata.py",
    ),
    (
        f"{MAMBA2}:Mamba2AttentionMetadata",
        "num_prefills num_prefill_tokens num_decodes num_decode_tokens checkpoint_chunk_idx checkpoint_meta",
        "filtered_mixer.py, mamba2.py, step_metadata.py",
    ),
    (f"{CHECKPOINT}:MambaPrefillCheckpointMetadata", "checkpoint_offsets", "mamba2.py"),
    (
        "vllm.v1.worker.gpu.input_batch:InputBatch",
        "num_reqs num_reqs_after_padding idx_mapping_np prompt_lens is_prefilling_np",
        "model_state.py",
    ),
    ("vllm.v1.engine:EngineCoreRequest", "prompt_token_ids prompt_embeds cache_salt", "prefix_cache.py"),
    ("vllm.engine.arg_utils:EngineArgs", "worker_extension_cls model_impl additional_config", "calibrate.py"),
    ("vllm:SamplingParams", "max_tokens temperature skip_reading_prefix_cache", "at_start.py"),
    ("vllm.config:VllmConfig", "kv_events_config kv_transfer_config parallel_config", "at_start.py, refusals.py"),
    (
        "vllm.config:ParallelConfig",
        "data_parallel_size distributed_executor_backend enable_expert_parallel tensor_parallel_size",
        "at_start.py, refusals.py",
    ),
    # Of DeciMamba.
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
