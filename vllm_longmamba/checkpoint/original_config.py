"""Reads the config.json of original state-spaces checkpoints, which stock vLLM refuses for its missing `model_type`.

Format: `MambaConfig` of github.com/state-spaces/mamba (mamba_ssm/models/config_mamba.py) and the keyword arguments of
its `Mamba` and `Mamba2` modules, which `ssm_cfg` holds.
"""

from typing import Any

from vllm_longmamba.checkpoint.time_step_limit import check_time_step_limit
from vllm_longmamba.compatibility import errors_only

ORIGINAL_FORMAT_ATTRIBUTE = "longmamba_original_format"

_REQUIRED = {"d_model", "n_layer", "vocab_size"}
# Options of the original modules that vLLM's mixers cannot express, with the only value they stand for.
_FIXED_MODEL_OPTIONS = {"rms_norm": True, "d_intermediate": 0, "attn_layer_idx": []}
_FIXED_SSM_OPTIONS = {
    "Mamba1": {},
    "Mamba2": {"rmsnorm": True, "norm_before_gate": False, "D_has_hdim": False, "d_ssm": None},
}
# Options that only initialise weights or choose a kernel for training.
_IGNORED_SSM_OPTIONS = {
    *("A_init_range", "conv_init", "use_fast_path", "use_mem_eff_path"),
    *("dt_init", "dt_init_floor", "dt_max", "dt_min", "dt_scale"),
}


def is_original_format(config: dict[str, Any]) -> bool:
    """Whether a config.json is of the original state-spaces format: no `model_type`, but `d_model` and `n_layer`."""
    return "model_type" not in config and config.keys() >= _REQUIRED


def translate_original_config(config: dict[str, Any]) -> dict[str, Any]:
    """Translate an original config.json into keyword arguments of transformers' `MambaConfig` or `Mamba2Config`.

    Returns:
        The arguments, `model_type` and `architectures` included.

    Raises:
        ValueError: the checkpoint uses an option that vLLM's mixers do not implement, or one that is unknown.
    """
    ssm = dict(config.get("ssm_cfg") or {})
    layer = ssm.pop("layer", "Mamba1")
    if layer not in _FIXED_SSM_OPTIONS:
        raise ValueError(f"config.json: ssm_cfg.layer must be 'Mamba1' or 'Mamba2', but is {layer!r}")
    _require_fixed(config, _FIXED_MODEL_OPTIONS, "config.json")
    _require_fixed(ssm, _FIXED_SSM_OPTIONS[layer], "config.json: ssm_cfg")
    if layer == "Mamba2":
        check_time_step_limit(ssm.pop("dt_limit", None), "ssm_cfg.dt_limit")

    d_model = config["d_model"]
    multiple = config.get("pad_vocab_size_multiple", 8)
    expand = ssm.pop("expand", 2)
    common = {
        "vocab_size": -(-config["vocab_size"] // multiple) * multiple,
        "hidden_size": d_model,
        "num_hidden_layers": config["n_layer"],
        "expand": expand,
        "conv_kernel": ssm.pop("d_conv", 4),
        "use_bias": ssm.pop("bias", False),
        "use_conv_bias": ssm.pop("conv_bias", True),
        "residual_in_fp32": config.get("residual_in_fp32", True),
        "tie_word_embeddings": config.get("tie_embeddings", True),
        "layer_norm_epsilon": 1e-5,
        # The end of text is the tokenizer's; transformers' defaults of 0 and 2 are those of other tokenizers.
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        ORIGINAL_FORMAT_ATTRIBUTE: layer,
    }
    if layer == "Mamba1":
        own = {
            "model_type": "mamba",
            "architectures": ["MambaForCausalLM"],
            "state_size": ssm.pop("d_state", 16),
            "time_step_rank": ssm.pop("dt_rank", "auto"),
        }
    else:
        headdim = ssm.pop("headdim", 64)
        own = {
            "model_type": "mamba2",
            "architectures": ["Mamba2ForCausalLM"],
            "state_size": ssm.pop("d_state", 128),
            "head_dim": headdim,
            "num_heads": expand * d_model // headdim,
            "n_groups": ssm.pop("ngroups", 1),
            "chunk_size": ssm.pop("chunk_size", 256),
        }
    unknown = ssm.keys() - _IGNORED_SSM_OPTIONS - _FIXED_SSM_OPTIONS[layer].keys()
    if unknown:
        raise ValueError(f"config.json: ssm_cfg has options not known for {layer}: {', '.join(sorted(unknown))}")
    return common | own


def _require_fixed(options: dict[str, Any], fixed: dict[str, Any], place: str) -> None:
    for name, value in fixed.items():
        given = options.get(name, value)
        if given != value:
            raise ValueError(f"{place}: {name} must be {value!r} for vLLM's Mamba layers, but is {given!r}")


def register_config_parser() -> None:
    """Extend vLLM's "hf" config parser by one that falls back to the original format where the stock one fails."""
    from transformers import Mamba2Config, MambaConfig, PreTrainedConfig
    from vllm.transformers_utils.config import HFConfigParser, get_config_parser, register_config_parser

    if getattr(type(get_config_parser("hf")), "reads_original_checkpoints", False):
        return

    class OriginalCheckpointConfigParser(HFConfigParser):  # type: ignore[misc]
        """vLLM's parser for Hugging Face configs, which also reads those of original state-spaces checkpoints."""

        reads_original_checkpoints = True

        def parse(
            self, model: Any, trust_remote_code: bool, revision: str | None = None, *given: Any, **kwargs: Any
        ) -> Any:
            """Same arguments and result as the stock parser's; errors of the stock parser for all other configs."""
            try:
                return super().parse(model, trust_remote_code, revision, *given, **kwargs)
            except ValueError:
                config, _ = PreTrainedConfig.get_config_dict(model, revision=revision)
                if not is_original_format(config):
                    raise
            translated = translate_original_config(config)
            config_cls = MambaConfig if translated.pop("model_type") == "mamba" else Mamba2Config
            return config, config_cls(**translated)

    # vLLM warns that a known format is overwritten; that is what is wanted here.
    with errors_only("vllm.transformers_utils.config"):
        register_config_parser("hf")(OriginalCheckpointConfigParser)
