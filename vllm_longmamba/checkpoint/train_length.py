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
    more. A hybrid's attention layers keep keys and values of every token, so its default is fitted to the memory. A
    scaled rotary embedding, such as `--hf-overrides` asks for, bounds both. `max_model_len` of vLLM's `ModelConfig`,
    which is under construction, is what the user gave, None or -1.

    Raises:
        ValueError: more is asked for than the model's scaled rotary embedding covers.
    """
    config = model_config.hf_text_config
    arch_config = model_config.model_arch_config
    in_config, _ = arch_config.derived_max_model_len_and_key
    given = model_config.max_model_len if model_config.max_model_len not in (None, -1) else None
    if _rotary_type(config) != "default":
        derived = _scaled_length(config, int(in_config), given)
        _remember_original_length(config, model_config.hf_overrides)
    else:
        longest = DEFAULT_MAX_MODEL_LEN if in_config == float("inf") else max(int(in_config), DEFAULT_MAX_MODEL_LEN)
        target = longest if given is None else given
        _extend_positions(config, target)
        derived = max(longest, target)
    arch_config.derived_max_model_len_and_key = (derived, "longmamba")
    if given is None and config.model_type not in _PURE:
        model_config.max_model_len = -1


def _rotary_parameters(config: Any) -> dict[str, Any]:
    return getattr(config, "rope_parameters", None) or {}


def _rotary_type(config: Any) -> str:
    return str(_rotary_parameters(config).get("rope_type", "default"))


def _scaled_length(config: Any, in_config: int, given: int | None) -> int:
    """The length from which vLLM derives `max_model_len`, checked against what the scaled embedding covers."""
    rope, kind = _rotary_parameters(config), _rotary_type(config)
    reach = in_config
    if kind == "yarn" and "original_max_position_embeddings" in rope:
        reach = int(rope["original_max_position_embeddings"] * rope["factor"])
    elif kind == "linear":
        reach = int(in_config * rope["factor"])
    if given is not None and given > reach:
        raise ValueError(
            f"--model-impl longmamba: the model scales its rotary embedding ({kind}), which does not reach beyond "
            f"{reach} positions; pass --max-model-len {reach} or less, or scale it further with --hf-overrides "
            """'{"rope_parameters": {...}}'"""
        )
    # vLLM itself multiplies by the factor of all kinds but YaRN and a few that no Mamba model has.
    return in_config if kind == "linear" else reach


def _remember_original_length(config: Any, overrides: Any) -> None:
    """Keep the training length where the user has replaced it in the config, as vLLM wants it for YaRN."""
    original = _rotary_parameters(config).get("original_max_position_embeddings")
    if original is not None and isinstance(overrides, dict) and "max_position_embeddings" in overrides:
        setattr(config, _LENGTH_IN_CONFIG, original)


def _extend_positions(config: Any, longest: int) -> None:
    """Make the rotary embedding's table cover `longest` positions: vLLM reads past its end otherwise."""
    in_config = getattr(config, "max_position_embeddings", None)
    if in_config is None or in_config >= longest:
        return
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
