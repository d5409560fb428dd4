"""The models of the benchmark: configurations with the published shapes, for dummy weights."""

from pathlib import Path
from typing import Any

GIB = 2**30
MAX_LENGTH = 131072

# Memory of the states and keys of 256 sequences (and of one long prompt's keys), in GiB.
CACHE_GIB = {"mamba-1.4b": 6, "mamba2-1.3b": 30, "zamba2-1.2b": 24, "falcon-mamba-7b": 12}
MODELS = tuple(CACHE_GIB)


def model_config(name: str, tiny: bool = False) -> Any:
    """A transformers configuration.

    Args:
        name: one of MODELS.
        tiny: two small layers (six for the hybrid), to try the script out without a GPU.
    """
    from transformers import FalconMambaConfig, Mamba2Config, MambaConfig, Zamba2Config

    common = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    small = {"num_hidden_layers": 2, "hidden_size": 64} if tiny else {}
    if name == "mamba-1.4b":
        shape: dict[str, Any] = {"hidden_size": 2048, "num_hidden_layers": 48, "state_size": 16, "expand": 2}
        shape |= {"time_step_rank": 128, "vocab_size": 50280, **small}
        return MambaConfig(**common, **shape, architectures=["MambaForCausalLM"])
    if name == "falcon-mamba-7b":
        shape = {"hidden_size": 4096, "num_hidden_layers": 64, "state_size": 16, "expand": 2}
        shape |= {"time_step_rank": 256, "vocab_size": 65024, "intermediate_size": 128 if tiny else 8192, **small}
        return FalconMambaConfig(**common, **shape, architectures=["FalconMambaForCausalLM"])
    if name == "mamba2-1.3b":
        shape = {"hidden_size": 2048, "num_hidden_layers": 48, "state_size": 128, "expand": 2, "chunk_size": 256}
        shape |= {"num_heads": 64, "head_dim": 64, "n_groups": 1, "vocab_size": 50288}
        if tiny:
            shape |= {**small, "num_heads": 8, "head_dim": 16}
        return Mamba2Config(**common, **shape, tie_word_embeddings=True, architectures=["Mamba2ForCausalLM"])
    hybrid_layers = [2, 5] if tiny else [5, 11, 17, 23, 29, 35]
    shape = {"hidden_size": 2048, "num_hidden_layers": 38, "vocab_size": 32000, "mamba_d_state": 64, "mamba_expand": 2}
    shape |= {"mamba_ngroups": 1, "n_mamba_heads": 64, "mamba_headdim": 64, "num_attention_heads": 32}
    shape |= {"num_key_value_heads": 32, "intermediate_size": 8192, "chunk_size": 256}
    if tiny:
        shape |= {"hidden_size": 64, "num_hidden_layers": 6, "n_mamba_heads": 8, "mamba_headdim": 16}
        shape |= {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 128}
    layers = ["hybrid" if layer in hybrid_layers else "mamba" for layer in range(shape["num_hidden_layers"])]
    return Zamba2Config(
        **common,
        **shape,
        layers_block_type=layers,
        num_mem_blocks=1,
        adapter_rank=128,
        use_mem_rope=True,
        use_shared_attention_adapter=True,
        max_position_embeddings=MAX_LENGTH,
        architectures=["Zamba2ForCausalLM"],
    )


def filtered_channels(config: Any) -> tuple[list[int], int]:
    """The Mamba layers of a configuration, and the channels (or heads) of each."""
    layers = list(range(config.num_hidden_layers))
    if config.model_type == "mamba2":
        return layers, config.num_heads
    if config.model_type == "zamba2":
        return layers, config.n_mamba_heads
    return layers, config.intermediate_size


def write_model(name: str, folder: Path, tiny: bool = False) -> Path:
    """Write the configuration and a threshold table for dummy weights; returns the model's folder.

    The table: 35 % of the channels are global; an unfiltered end of half the training length, as by default. Dummy
    weights are next to 0, so dt is softplus(0) = 0.69 up to small deviations of both signs; a threshold of 0.69315
    filters about half of a global channel's tokens.
    """
    import numpy as np
    import torch

    from vllm_longmamba.checkpoint.fingerprint import DUMMY
    from vllm_longmamba.tables import UNCLAMPED, LayerThresholds, TableMetadata, ThresholdTable, save_table

    folder.mkdir(parents=True, exist_ok=True)
    config = model_config(name, tiny)
    config.save_pretrained(folder)
    layers, channels = filtered_channels(config)
    generator = torch.Generator().manual_seed(0)
    row_lengths = np.array([32, 64, 128] if tiny else [2000, 4000, 8000, 16000, 32000, 64000, 100000])
    thresholds = {}
    for layer in layers:
        is_global = torch.rand(channels, generator=generator) < 0.35
        dt_threshold = torch.full((len(row_lengths), channels), 0.693147)
        dt_threshold[0] = -1.0
        thresholds[layer] = LayerThresholds(torch.where(is_global, 0.5, 1e-9).double(), dt_threshold)
    train_length = int(row_lengths[0])
    metadata = TableMetadata(
        model_id=name, weights_fingerprint=DUMMY, train_length=train_length, corpus="none: random", seed=0,
        method=UNCLAMPED, clamp_percent=0, min_retention=0.05, num_sequences=1, tool_version="benchmark",
        budget=0.5, unfiltered_end=train_length // 2,
    )  # fmt: skip
    table = ThresholdTable(metadata=metadata, row_lengths=row_lengths, layers=thresholds)
    save_table(table, folder / "table.safetensors")
    return folder
