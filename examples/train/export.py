"""Writes a trained model as its family publishes checkpoints."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import nn

from .corpus import END_OF_TEXT, SPECIAL_TOKENS, TOKENIZER_FILE, whole_file
from .settings import Settings

MAX_POSITIONS = 262_144  # of the rotary embedding; a longer context needs another value in config.json
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": END_OF_TEXT,
    "eos_token": END_OF_TEXT,
    "unk_token": END_OF_TEXT,
    "pad_token": SPECIAL_TOKENS[1],
    "model_max_length": 1_048_576,
    "clean_up_tokenization_spaces": False,
}


def export_model(
    model: nn.Module, settings: Settings, tokenizer: Tokenizer, path: Path, dtype: torch.dtype = torch.bfloat16
) -> Path:
    """Writes config, weights and tokenizer.

    Args:
        model: as trained, of the family that the settings name.
        settings: its settings.
        tokenizer: of the text.
        path: the folder, made if missing.
        dtype: of matrices. Vectors (biases, norms, A_log, D) stay in float32, as in the example model, except in
            Hugging Face's format, where vLLM and transformers convert all weights anyway.

    Returns:
        The file with the weights.
    """
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / TOKENIZER_FILE))
    (path / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG, indent=1) + "\n")
    weights = {name: _stored(name, weight, dtype) for name, weight in model.state_dict().items()}
    write = _write_zamba2 if settings.family == "zamba2" else _write_original
    return write(weights, settings, path)


def _stored(name: str, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    is_small = weight.dim() == 1 or name.endswith("A_log")
    return weight.detach().to("cpu", torch.float32 if is_small else dtype).contiguous()


def _write_original(weights: dict[str, torch.Tensor], settings: Settings, path: Path) -> Path:
    """The format of state-spaces/mamba-* and mamba2-*: no model_type, the tied head stored by reference."""
    ssm_cfg: dict[str, Any]
    if settings.family == "mamba2":
        ssm_cfg = {"layer": "Mamba2", "d_state": settings.d_state, "headdim": settings.headdim}
        others = {"d_intermediate": 0, "attn_layer_idx": [], "attn_cfg": {}, "tie_embeddings": True}
    else:
        # the published Mamba-1 configs leave mamba_ssm's default out
        ssm_cfg = {} if settings.d_state == 16 else {"d_state": settings.d_state}
        others = {}
    config = {
        "d_model": settings.d_model,
        "n_layer": settings.n_layer,
        "vocab_size": settings.vocabulary,
        "ssm_cfg": ssm_cfg,
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 8,
        **others,
    }
    (path / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    weights["lm_head.weight"] = weights["backbone.embedding.weight"]
    with whole_file(path / "pytorch_model.bin") as part:
        torch.save(weights, part)
    return path / "pytorch_model.bin"


def _write_zamba2(weights: dict[str, torch.Tensor], settings: Settings, path: Path) -> Path:
    """The format of Zyphra/Zamba2-*. Written without transformers, whose versions name things differently."""
    layers = ["hybrid" if layer in settings.hybrid_layers else "mamba" for layer in range(settings.n_layer)]
    config = {
        "architectures": ["Zamba2ForCausalLM"],
        "model_type": "zamba2",
        "dtype": str(weights["model.embed_tokens.weight"].dtype).removeprefix("torch."),
        "vocab_size": settings.vocabulary,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
        "tie_word_embeddings": True,
        "max_position_embeddings": MAX_POSITIONS,
        "hidden_size": settings.d_model,
        "num_hidden_layers": settings.n_layer,
        "layers_block_type": layers,
        "hybrid_layer_ids": sorted(settings.hybrid_layers),
        "num_mem_blocks": 1,
        "mamba_expand": 2,
        "mamba_d_conv": 4,
        "mamba_d_state": settings.d_state,
        "mamba_ngroups": 1,
        "n_mamba_heads": settings.nheads,
        "mamba_headdim": settings.headdim,
        "use_conv_bias": True,
        "add_bias_linear": False,
        "chunk_size": 256,
        # transformers clamps dt from below with it; vLLM and this training do not.
        "time_step_min": 1e-9,
        "intermediate_size": settings.mlp_width,
        "hidden_act": "gelu",
        "adapter_rank": settings.adapter_rank,
        "use_shared_attention_adapter": False,
        "num_attention_heads": settings.attention_heads,
        "num_key_value_heads": settings.attention_heads,
        "attention_head_dim": 2 * settings.d_model // settings.attention_heads,
        "attention_hidden_size": 2 * settings.d_model,
        "use_mem_rope": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": settings.rope_theta},
        "rope_theta": settings.rope_theta,
        "use_long_context": False,
        "rms_norm_eps": 1e-5,
        "num_logits_to_keep": 1,
        "use_cache": True,
    }
    (path / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    with whole_file(path / "model.safetensors") as part:
        save_file(weights, part, metadata={"format": "pt"})
    return path / "model.safetensors"
