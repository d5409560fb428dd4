"""How long a prompt a LongMamba model takes by default, and where its training length is known from."""

from typing import Any

from vllm_longmamba.options import LongMambaOptions

DEFAULT_MAX_MODEL_LEN = 131072

# Pure Mamba models, whose config.json names no length.
_PURE = ("mamba", "mamba2", "falcon_mamba")
# The models of state-spaces were trained on 2048 tokens (arXiv 2312.00752, section E.2; 2405.21060). Others of the same
# classes were not, such as lightonai/mambaoutai (vocabulary 65024) or fla-hub/mamba-2.7B-100B (32000). The vocabulary,
# GPT-NeoX's 50277 tokens padded to a multiple of 8 or 16, tells them apart.
_STATE_SPACES_LENGTH = 2048
_STATE_SPACES_VOCABULARY = range(50277, 50289)
# Its training went from 2048 to 8192 tokens (arXiv 2410.05355, section 3).
_FALCON_MAMBA_LENGTH = 8192
_LENGTH_IN_CONFIG = "longmamba_config_length"


def set_default_length(model_config: Any) -> None:
    """Let a model take prompts far beyond its training length, in place, before vLLM derives `max_model_len`.

    Stock vLLM takes 2048 tokens where config.json names no length, and refuses more than config.json names. Here the
    default is `DEFAULT_MAX_MODEL_LEN` (or the config's own length where that is larger), and `--max-model-len` may be
    more. A hybrid's attention layers keep keys and values of every token, so its default is fitted to the memory.
    `max_model_len` of vLLM's `ModelConfig`, which is under construction, is what the user gave, None or -1.

    Raises:
        ValueError: more is asked for than the model's scaled rotary embedding covers.
    """
    config = model_config.hf_text_config
    arch_config = model_config.model_arch_config
    in_config, _ = arch_config.derived_max_model_len_and_key
    given = model_config.max_model_len if model_config.max_model_len not in (None, -1) else None
    longest = DEFAULT_MAX_MODEL_LEN if in_config == float("inf") else max(int(in_config), DEFAULT_MAX_MODEL_LEN)
    if given is None and _scales_rotary_embedding(config):
        longest = int(in_config)
    target = longest if given is None else given
    _extend_positions(config, target)
    arch_config.derived_max_model_len_and_key = (max(longest, target), "longmamba")
    if given is None and config.model_type not in _PURE:
        model_config.max_model_len = -1


def _scales_rotary_embedding(config: Any) -> bool:
    rope = getattr(config, "rope_parameters", None) or {}
    return bool(rope.get("rope_type", "default") != "default")


def _extend_positions(config: Any, longest: int) -> None:
    """Make the rotary embedding's table cover `longest` positions: vLLM reads past its end otherwise."""
    in_config = getattr(config, "max_position_embeddings", None)
    if in_config is None or in_config >= longest:
        return
    if _scales_rotary_embedding(config):
        raise ValueError(
            "--model-impl longmamba: the model scales its rotary embedding "
            f"({config.rope_parameters['rope_type']}), which does not reach beyond {in_config} positions; "
            f"pass --max-model-len {in_config} or less"
        )
    setattr(config, _LENGTH_IN_CONFIG, in_config)
    config.max_position_embeddings = longest


def is_state_spaces(config: Any) -> bool:
    """Whether a transformers config is that of a model of state-spaces, or of its twin in Hugging Face's format."""
    vocabulary = getattr(config, "vocab_size", None)
    return config.model_type in ("mamba", "mamba2") and vocabulary in _STATE_SPACES_VOCABULARY


def train_length(config: Any, options: LongMambaOptions) -> int:
    """Tokens of the sequences a model was trained on (the paper's L).

    Args:
        config: the model's transformers config. A hybrid's `max_position_embeddings` counts, the context of its last
            training stage (4096 in Zamba2, 262144 in Jamba, 131072 in the Granite 4 hybrids).
        options: `options.train_length` wins.

    Raises:
        ValueError: neither the option, nor the model's family, nor the config tells.
    """
    if options.train_length is not None:
        return options.train_length
    vocabulary = getattr(config, "vocab_size", None)
    if is_state_spaces(config):
        return _STATE_SPACES_LENGTH
    if config.model_type == "falcon_mamba":
        return _FALCON_MAMBA_LENGTH
    in_config = getattr(config, _LENGTH_IN_CONFIG, None) or getattr(config, "max_position_embeddings", None)
    if in_config is not None:
        return int(in_config)
    raise ValueError(
        f"the training length of this {config.model_type!r} model is not known: its config names none, and with a "
        f"vocabulary of {vocabulary} it is not one of state-spaces' ({_STATE_SPACES_LENGTH} tokens). Say how many "
        """tokens it was trained on, --additional-config '{"longmamba": {"train_length": N}}' when serving, or """
        "`longmamba calibrate MODEL --train-length N`"
    )
