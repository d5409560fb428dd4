"""What functions of vLLM must still do for the plugin, by patterns that drift.py looks up in their sources."""

from vllm_longmamba.engine.vllm_names import CHECKPOINT, MAMBA, MIXER1, MIXER2, STATE

# What a function must still do, looked up in its source: (module:name, pattern, what the plugin counts on, used by).
SOURCES = [
    (
        f"{MIXER2}.__init__",
        r"self\.tped_dt_size = self\.num_heads // self\.tp_size",
        "dt has one column per head",
        "filtered_mixer.py",
    ),
    (f"{MIXER2}.__init__", r"self\.dt_bias = nn\.Parameter", "the mixer owns its dt_bias", "mamba2.py"),
    (f"{MIXER2}.__init__", r"self\.A = nn\.Parameter\(", "A (nheads of this rank,)", "mamba2.py"),
    (
        f"{MIXER2}.conv_ssm_forward",
        r"projected_states\[\.\.\., self\.tped_intermediate_size :\],\s+\[self\.tped_conv_size, self\.tped_dt_size\]",
        "the raw dt is the last columns of projected_states",
        "filtered_mixer.py",
    ),
    (f"{MIXER2}.conv_ssm_forward", r"dt_softplus=True", "softplus(-inf) = 0 is left to the kernels", "mamba2.py"),
    (
        f"{MIXER2}.forward",
        r"torch\.ops\.vllm\.mamba_mixer2|conv_ssm_forward",
        "the layer runs conv_ssm_forward",
        "filtered_mixer.py",
    ),
    (
        f"{MIXER1}.forward",
        r"torch\.ops\.vllm\.mamba_mixer\(",
        "the layer runs forward_impl by a custom op",
        "filtered_mixer.py",
    ),
    (
        f"{MIXER1}.forward_impl",
        r"hidden_states_BC, gate = projected_states\.chunk\(2",
        "in_proj gives x, then z",
        "filtered_mixer.py",
    ),
    (
        f"{MIXER1}._ssm_transform",
        r"self\.dt_proj\(time_step\)\[0\]\.transpose\(-2, -1\)",
        "dt comes without its bias, transposed",
        "filtered_mixer.py",
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
    (f"{MIXER1}.__init__", r"self\.kv_cache = \(torch", "kv_cache is (conv_state, ssm_state)", "mamba1.py"),
    (f"{MIXER1}.__init__", r"skip_bias_add=True", "dt_proj leaves its bias to the scan", "mamba1.py"),
    (
        f"{MIXER1}.__init__",
        r"static_forward_context\[prefix\] = self",
        "the builder finds its layer by name",
        "step_metadata.py",
    ),
    (
        f"{MIXER2}.__init__",
        r"static_forward_context\[prefix\] = self",
        "the builder finds its layer by name",
        "step_metadata.py",
    ),
    (
        f"{MAMBA}:BaseMambaAttentionMetadataBuilder.__init__",
        r"self\.decode_cudagraph_max_bs",
        "size of a graph's buffers",
        "step_metadata.py",
    ),
    (
        f"{MAMBA}:BaseMambaAttentionMetadataBuilder.__init__",
        r"self\.compilation_config = ",
        "cudagraph_mode",
        "step_metadata.py",
    ),
    (
        f"{MAMBA}:BaseMambaAttentionMetadataBuilder.__init__",
        r"self\.num_spec_tokens: int[\s\S]*self\.use_spec_decode = ",
        "draft tokens in a decode",
        "step_metadata.py",
    ),
    (
        f"{MIXER2}.conv_ssm_forward",
        r"ring_start is not None and self\._updates_replayssm_trackers[\s\S]*reset_replayssm_ring_trackers\("
        r"\s+ring_start,\s+prev_num_accepted,\s+prev_query_len,\s+state_indices_tensor_p,",
        "a prompt empties the rings that FlashInfer keeps",
        "mamba2.py",
    ),
    (
        f"{CHECKPOINT}:compute_mamba_prefill_checkpoints",
        r"offsets\.append\(position - query_start if valid else 0\)",
        "a checkpoint is a number of tokens of the step, 0 for none",
        "mamba2.py",
    ),
    (
        f"{CHECKPOINT}:MambaPrefillCheckpointBuilder.build",
        r"checkpoint_offsets_tensor = async_tensor_h2d\(\s+checkpoint_offsets,\s+dtype=torch\.int32",
        "checkpoints are int32 on the device",
        "mamba2.py",
    ),
    (
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner._build_attention_metadata",
        r"num_prompt_tokens_cpu = self\.input_batch\.num_prompt_tokens_cpu_tensor",
        "where runner V1 has its prompt lengths",
        "prompt_lengths.py",
    ),
    (
        "vllm.v1.request:Request.__init__",
        r'sampling_params\.extra_args\.get\(\s*"kv_transfer_params"',
        "where a request says that its prompt is for another engine",
        "prompt_lengths.py",
    ),
    (
        f"{MAMBA}:BaseMambaAttentionMetadataBuilder._compute_common_metadata",
        r"self\.metadata_cls\(",
        "our metadata class is built",
        "step_metadata.py",
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
        "train_length.py",
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
        "at_start.py",
    ),
    (
        "vllm.config:VllmConfig.try_verify_and_update_config",
        r"MODELS_CONFIG_MAP\.get\(architecture",
        "our hook is called",
        "config.py",
    ),
    (
        "vllm.v1.worker.worker_base:WorkerWrapperBase",
        r"worker_class\.__bases__ = worker_class\.__bases__ \+ \(\s*worker_extension_cls",
        "the calibration's methods join the worker",
        "worker.py",
    ),
    # Of DeciMamba.
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
