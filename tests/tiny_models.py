"""Small random checkpoints of every family, in the formats in which such models are published.

The random numbers are chosen so that the LongMamba filter matters: at 64 to 128 tokens about half of the channels keep
more than 1e-2 of their state, dt varies strongly from token to token, and the logits are spread widely (standard
deviation about 4), so that greedy decoding has few near-ties. Nothing here needs vLLM.
"""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

TOKENIZER = Path(__file__).resolve().parent.parent / "examples" / "passkey-mamba2-4m"
END_OF_TEXT = 256
MAX_POSITIONS = 8192

# The dt of a channel averages about 0.3, so that sum(dt) over 96 tokens is about 29. `_decay_rates` spreads
# A * sum(dt) from 0.3 to 40 over the channels: the median, 3.5, leaves a retention of 3e-2.
MEAN_DT_SUM = 29.0


def write_mamba1_original(
    path: Path,
    *,
    seed: int = 0,
    n_layer: int = 3,
    d_model: int = 64,
    vocab_size: int = 262,
    safetensors: bool = False,
    tokenizer: bool = True,
) -> Path:
    """Writes a Mamba-1 checkpoint exactly as the state-spaces/mamba-* repositories hold it.

    Args:
        path: the folder to make.
        seed: equal seeds give equal files.
        vocab_size: padded to a multiple of 8 in the embedding, as the config says.
        safetensors: model.safetensors (the tied weight stored once) instead of pytorch_model.bin (stored twice).
        tokenizer: copy the byte-level tokenizer of the example model into the folder.

    Returns:
        `path`.
    """
    d_inner, d_state, d_conv, dt_rank = 2 * d_model, 16, 4, math.ceil(d_model / 16)
    config = _original_config(d_model, n_layer, vocab_size, ssm_cfg={}, pad_vocab_size_multiple=8)
    shapes: dict[str, tuple[int, ...]] = {
        "A_log": (d_inner, d_state),
        "D": (d_inner,),
        "in_proj.weight": (2 * d_inner, d_model),
        "conv1d.weight": (d_inner, 1, d_conv),
        "conv1d.bias": (d_inner,),
        "x_proj.weight": (dt_rank + 2 * d_state, d_inner),
        "dt_proj.weight": (d_inner, dt_rank),
        "dt_proj.bias": (d_inner,),
        "out_proj.weight": (d_model, d_inner),
    }
    return _write_original(path, config, shapes, seed=seed, safetensors=safetensors, tokenizer=tokenizer)


def write_mamba2_original(
    path: Path,
    *,
    seed: int = 0,
    n_layer: int = 3,
    d_model: int = 64,
    vocab_size: int = 262,
    d_state: int = 32,
    headdim: int = 16,
    chunk_size: int = 32,
    safetensors: bool = False,
    tokenizer: bool = True,
) -> Path:
    """Writes a Mamba-2 checkpoint exactly as the state-spaces/mamba2-* repositories hold it (vocabulary padded to 16).

    Args and result as for `write_mamba1_original`.
    """
    d_inner, d_conv = 2 * d_model, 4
    nheads, conv_dim = d_inner // headdim, d_inner + 2 * d_state
    ssm_cfg = {"layer": "Mamba2", "d_state": d_state, "headdim": headdim, "chunk_size": chunk_size}
    config = _original_config(d_model, n_layer, vocab_size, ssm_cfg=ssm_cfg, pad_vocab_size_multiple=16) | {
        "d_intermediate": 0,
        "attn_layer_idx": [],
        "attn_cfg": {},
        "tie_embeddings": True,
    }
    shapes: dict[str, tuple[int, ...]] = {
        "dt_bias": (nheads,),
        "A_log": (nheads,),
        "D": (nheads,),
        "in_proj.weight": (d_inner + conv_dim + nheads, d_model),
        "conv1d.weight": (conv_dim, 1, d_conv),
        "conv1d.bias": (conv_dim,),
        "norm.weight": (d_inner,),
        "out_proj.weight": (d_model, d_inner),
    }
    return _write_original(path, config, shapes, seed=seed, safetensors=safetensors, tokenizer=tokenizer)


def write_hf_twin(original_path: Path, path: Path) -> Path:
    """Writes the Hugging Face format twin of an original checkpoint: the same numbers, transformers' names and config.

    Its vocab_size is the number of embedding rows (padding included), as in the published state-spaces/*-hf models.
    """
    from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

    original = json.loads((original_path / "config.json").read_text())
    if (original_path / "model.safetensors").exists():
        from safetensors.torch import load_file

        weights = load_file(original_path / "model.safetensors")
    else:
        weights = torch.load(original_path / "pytorch_model.bin", weights_only=True)
    weights = {name.replace("backbone.embedding.", "backbone.embeddings."): w for name, w in weights.items()}
    weights.setdefault("lm_head.weight", weights["backbone.embeddings.weight"])

    mixer = "backbone.layers.0.mixer."
    common: dict[str, Any] = {
        "vocab_size": weights["lm_head.weight"].shape[0],
        "hidden_size": original["d_model"],
        "num_hidden_layers": original["n_layer"],
        "layer_norm_epsilon": 1e-5,
        "expand": 2,
        "conv_kernel": 4,
        "use_bias": False,
        "use_conv_bias": True,
        "tie_word_embeddings": True,
        **_special_tokens(),
    }
    ssm_cfg = original["ssm_cfg"]
    model: Any
    if ssm_cfg.get("layer", "Mamba1") == "Mamba2":
        nheads = weights[mixer + "A_log"].shape[0]
        headdim = 2 * original["d_model"] // nheads
        d_state = (weights[mixer + "conv1d.weight"].shape[0] - nheads * headdim) // 2
        config = Mamba2Config(
            **common,
            num_heads=nheads,
            head_dim=headdim,
            state_size=d_state,
            n_groups=1,
            chunk_size=ssm_cfg.get("chunk_size", 256),
        )
        model = Mamba2ForCausalLM(config)
    else:
        d_state, dt_rank = weights[mixer + "A_log"].shape[1], weights[mixer + "dt_proj.weight"].shape[1]
        model = MambaForCausalLM(MambaConfig(**common, state_size=d_state, time_step_rank=dt_rank))
    model.load_state_dict({name: w.float() for name, w in weights.items()})
    model.save_pretrained(path)
    if (original_path / "tokenizer.json").exists():
        _copy_tokenizer(original_path, path)
    return path


def write_falcon_mamba(path: Path, *, seed: int = 0, tokenizer: bool = True) -> Path:
    """Writes a FalconMamba checkpoint: Mamba-1 whose dt, B and C pass an RMS norm without weights; head not tied."""
    from transformers import FalconMambaConfig, FalconMambaForCausalLM

    config = FalconMambaConfig(
        vocab_size=264,
        hidden_size=64,
        state_size=16,
        num_hidden_layers=3,
        layer_norm_epsilon=1e-5,
        mixer_rms_eps=1e-6,
        time_step_rank=4,
        tie_word_embeddings=False,
        **_special_tokens(),
    )
    return _write_hf(path, FalconMambaForCausalLM, config, seed=seed, tokenizer=tokenizer)


def write_zamba2(path: Path, *, seed: int = 0, tokenizer: bool = True) -> Path:
    """Writes a Zamba2 checkpoint of 6 layers, 3 of them hybrid, over 2 shared blocks with adapters and rope.

    `time_step_min` is next to 0 because transformers clamps dt from below with it, and vLLM does not.
    """
    from transformers import Zamba2Config, Zamba2ForCausalLM

    mamba, hybrid = "linear_attention", "hybrid"
    config = Zamba2Config(
        vocab_size=264,
        max_position_embeddings=MAX_POSITIONS,
        hidden_size=64,
        num_hidden_layers=6,
        layers_block_type=[mamba, hybrid, mamba, hybrid, mamba, hybrid],
        mamba_d_state=32,
        mamba_ngroups=1,
        n_mamba_heads=8,
        time_step_min=1e-9,
        chunk_size=32,
        intermediate_size=128,
        num_attention_heads=4,
        num_mem_blocks=2,
        use_shared_attention_adapter=True,
        adapter_rank=8,
        use_mem_rope=True,
        rms_norm_eps=1e-5,
        **_special_tokens(),
    )
    return _write_hf(path, Zamba2ForCausalLM, config, seed=seed, tokenizer=tokenizer)


def write_jamba(path: Path, *, seed: int = 0, tokenizer: bool = True, tied: bool = False, experts: int = 4) -> Path:
    """Writes a Jamba checkpoint: layers Mamba, attention, Mamba, Mamba; layers 1 and 3 with 2 of 4 experts.

    With `tied` the head is the embedding, and stored once; with one expert all layers have plain MLPs.
    """
    from transformers import JambaConfig, JambaForCausalLM

    config = JambaConfig(
        vocab_size=264,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=MAX_POSITIONS,
        num_experts=experts,
        num_experts_per_tok=min(2, experts),
        expert_layer_period=2,
        expert_layer_offset=1,
        attn_layer_period=4,
        attn_layer_offset=1,
        mamba_d_state=16,
        mamba_dt_rank=4,
        tie_word_embeddings=tied,
        **_special_tokens(),
    )
    return _write_hf(path, JambaForCausalLM, config, seed=seed, tokenizer=tokenizer)


def write_granite_hybrid(path: Path, *, seed: int = 0, tokenizer: bool = True) -> Path:
    """Writes a GraniteMoeHybrid checkpoint: layers Mamba-2, attention, Mamba-2; dense MLPs, no experts."""
    from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM

    config = GraniteMoeHybridConfig(
        vocab_size=264,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=3,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        num_attention_heads=2,
        num_key_value_heads=1,
        attention_multiplier=32**-0.5,
        residual_multiplier=0.7,
        max_position_embeddings=MAX_POSITIONS,
        num_local_experts=0,
        num_experts_per_tok=0,
        shared_intermediate_size=128,
        mamba_n_heads=8,
        mamba_d_state=32,
        mamba_n_groups=1,
        mamba_chunk_size=32,
        tie_word_embeddings=True,
        **_special_tokens(),
    )
    return _write_hf(path, GraniteMoeHybridForCausalLM, config, seed=seed, tokenizer=tokenizer)


def write_falcon_h1(path: Path, *, seed: int = 0, tokenizer: bool = True) -> Path:
    """Writes a Falcon-H1 checkpoint: Mamba-2 and attention side by side in each of 2 layers.

    Its mixer scales the raw dt after in_proj (`ssm_multipliers[4]`), so a filter applied too early gets it wrong.
    """
    from transformers import FalconH1Config, FalconH1ForCausalLM

    config = FalconH1Config(
        vocab_size=264,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=MAX_POSITIONS,
        mamba_d_ssm=128,
        mamba_n_heads=8,
        mamba_d_state=32,
        mamba_n_groups=1,
        mamba_chunk_size=32,
        mamba_rms_norm=False,
        ssm_multipliers=[1.0, 0.9, 0.8, 1.1, 0.6],
        **_special_tokens(),
    )
    return _write_hf(path, FalconH1ForCausalLM, config, seed=seed, tokenizer=tokenizer)


def write_nemotron_h(path: Path, *, seed: int = 0, tokenizer: bool = True) -> Path:
    """Writes a Nemotron-H checkpoint: layers Mamba-2, MLP, attention, Mamba-2, with 2 groups of B and C.

    `time_step_min` is next to 0 because transformers clamps dt from below with it, and vLLM does not.
    """
    from transformers import NemotronHConfig, NemotronHForCausalLM

    config = NemotronHConfig(
        vocab_size=264,
        hidden_size=64,
        layers_block_type=["linear_attention", "mlp", "full_attention", "linear_attention"],
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=MAX_POSITIONS,
        intermediate_size=128,
        ssm_state_size=32,
        mamba_num_heads=8,
        mamba_head_dim=16,
        n_groups=2,
        time_step_min=1e-9,
        chunk_size=32,
        **_special_tokens(),
    )
    return _write_hf(path, NemotronHForCausalLM, config, seed=seed, tokenizer=tokenizer)


def random_token_ids(count: int, *, seed: int = 0) -> list[int]:
    """Returns `count` random byte tokens (0..255), the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    token_ids: list[int] = torch.randint(0, 256, (count,), generator=generator).tolist()
    return token_ids


def _original_config(
    d_model: int, n_layer: int, vocab_size: int, *, ssm_cfg: dict[str, Any], pad_vocab_size_multiple: int
) -> dict[str, Any]:
    return {
        "d_model": d_model,
        "n_layer": n_layer,
        "vocab_size": vocab_size,
        "ssm_cfg": ssm_cfg,
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": pad_vocab_size_multiple,
    }


def _special_tokens() -> dict[str, int]:
    return {"bos_token_id": END_OF_TEXT, "eos_token_id": END_OF_TEXT, "pad_token_id": END_OF_TEXT}


def _write_original(
    path: Path,
    config: dict[str, Any],
    mixer_shapes: dict[str, tuple[int, ...]],
    *,
    seed: int,
    safetensors: bool,
    tokenizer: bool,
) -> Path:
    multiple, d_model = config["pad_vocab_size_multiple"], config["d_model"]
    rows = math.ceil(config["vocab_size"] / multiple) * multiple
    weights = {"backbone.embedding.weight": torch.empty(rows, d_model)}
    for layer in range(config["n_layer"]):
        for name, shape in mixer_shapes.items():
            weights[f"backbone.layers.{layer}.mixer.{name}"] = torch.empty(shape)
        weights[f"backbone.layers.{layer}.norm.weight"] = torch.empty(d_model)
    weights["backbone.norm_f.weight"] = torch.empty(d_model)
    _randomise(weights, seed)

    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config, indent=1))
    if safetensors:
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    else:
        weights["lm_head.weight"] = weights["backbone.embedding.weight"]
        torch.save(weights, path / "pytorch_model.bin")
    if tokenizer:
        _copy_tokenizer(TOKENIZER, path)
    return path


def _write_hf(path: Path, model_class: Any, config: Any, *, seed: int, tokenizer: bool) -> Path:
    model = model_class(config)
    model.tie_weights()
    _randomise({name: parameter.data for name, parameter in model.named_parameters()}, seed)
    model.save_pretrained(path)
    if tokenizer:
        _copy_tokenizer(TOKENIZER, path)
    return path


def _copy_tokenizer(source: Path, path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, path / name)


def _randomise(weights: dict[str, torch.Tensor], seed: int) -> None:
    """Fills every tensor in place with numbers that make the filter matter (see the module's docstring)."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in weights.items():
        weight.copy_(_random_values(name, weight.shape, generator))
    for name, weight in weights.items():
        dt_bias_name = name.replace("in_proj.weight", "dt_bias")
        if name.endswith("in_proj.weight") and dt_bias_name in weights:
            # Mamba-2: the last rows give the raw dt, whose standard deviation becomes 1.5.
            weight[-weights[dt_bias_name].shape[0] :] *= 1.5


def _random_values(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    def normal(std: float) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * std

    def uniform(low: float, high: float) -> torch.Tensor:
        return torch.rand(shape, generator=generator) * (high - low) + low

    if name.endswith("A_log"):
        return _decay_rates(shape, generator).log()
    if name.endswith((".dt_bias", "dt_proj.bias")):
        return uniform(-2.6, -1.4)
    if name.endswith(".D"):
        return uniform(0.1, 0.5)
    if name.endswith("bias"):
        return normal(0.2)
    if re.search(r"(norm_f|final_layernorm|model\.norm)\.weight$", name):
        # Random signs: with a tied head, a model would otherwise mostly predict the token that it has just read.
        return uniform(0.6, 1.4) * (torch.randint(0, 2, shape, generator=generator) * 2 - 1)
    if re.search(r"norm\w*\.weight$", name):
        return uniform(0.6, 1.4)
    if re.search(r"(embedding|embeddings|embed_tokens|lm_head)\.weight$", name):
        return normal(4 * shape[-1] ** -0.5)
    if name.endswith("dt_proj.weight"):
        return normal(1.5 * shape[-1] ** -0.5)
    if name.endswith("x_proj.weight"):
        # Its input, silu of unit variance, has a root mean square of about 0.6.
        return normal(1.6 * shape[-1] ** -0.5)
    if name.endswith("conv1d.weight"):
        return normal(shape[-1] ** -0.5)
    # Adapters and shared blocks of full size make a model chaotic: float32 rounding would grow past 1e-3.
    gain = 0.5 if re.search(r"adapter|\.linear\.|q_proj|k_proj|o_proj", name) else 1.0
    return normal(gain * shape[-1] ** -0.5)


def _decay_rates(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """-A: (channels,) for Mamba-2 or (channels, d_state) for Mamba-1, evenly spread in the logarithm."""
    channels = shape[0]
    exponents = torch.linspace(math.log(0.3), math.log(40.0), channels)
    rates = exponents[torch.randperm(channels, generator=generator)].exp() / MEAN_DT_SUM
    if len(shape) == 1:
        return rates
    return rates[:, None] * torch.linspace(1.0, 3.0, shape[1])
