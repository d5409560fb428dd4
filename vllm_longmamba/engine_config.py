"""What `--model-impl longmamba` changes in vLLM's configuration, all of it before any weight is loaded."""

import logging
from typing import Any

from vllm_longmamba.architectures import stock_name
from vllm_longmamba.checkpoint_config import ORIGINAL_FORMAT_ATTRIBUTE
from vllm_longmamba.model_length import set_default_length
from vllm_longmamba.options import KEY, options_from_config

logger = logging.getLogger("vllm.longmamba")

ORIGINAL_TOKENIZER = "EleutherAI/gpt-neox-20b"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
_PREPARED = "_longmamba_prepared"


def prepare_model_config(model_config: Any) -> None:
    """Set the defaults of a LongMamba model, in place, while vLLM builds its `ModelConfig`. Runs once per config."""
    if getattr(model_config, _PREPARED, False):
        return
    setattr(model_config, _PREPARED, True)
    set_default_length(model_config)
    _set_default_tokenizer(model_config)


def refuse_original_format(model_config: Any) -> None:
    """Stock vLLM cannot load original state-spaces checkpoints: say so, and what to do.

    Raises:
        ValueError: the checkpoint is of that format.
    """
    if getattr(model_config.hf_config, ORIGINAL_FORMAT_ATTRIBUTE, None) is not None:
        raise ValueError(
            f"{model_config.model!r} is an original state-spaces checkpoint, which stock vLLM cannot load; "
            "add --model-impl longmamba"
        )


def _set_default_tokenizer(model_config: Any) -> None:
    if getattr(model_config.hf_config, ORIGINAL_FORMAT_ATTRIBUTE, None) is None:
        return
    if model_config.tokenizer != model_config.model or model_config.skip_tokenizer_init:
        return
    from vllm.transformers_utils.repo_utils import file_or_path_exists

    if any(file_or_path_exists(model_config.model, name, model_config.revision) for name in _TOKENIZER_FILES):
        return
    logger.info(
        "%s has no tokenizer; using %s, which the state-spaces models were trained with (--tokenizer overrides this)",
        model_config.model,
        ORIGINAL_TOKENIZER,
    )
    model_config.tokenizer = ORIGINAL_TOKENIZER
    model_config.tokenizer_revision = None


class LongMambaModelConfig:
    """vLLM's per-architecture hook (an entry of MODELS_CONFIG_MAP) for all LongMamba variants."""

    @classmethod
    def verify_and_update_config(cls, vllm_config: Any) -> None:
        """Check the options, find the threshold table and set defaults. Runs once, in the front-end process.

        The path of the table found replaces the option `table`, so that every worker reads the same file.

        Args:
            vllm_config: vLLM's configuration, changed in place.

        Raises:
            ValueError: a wrong option, no table or a wrong table, or a feature that the filter does not support.
        """
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP

        options = options_from_config(vllm_config.additional_config)
        stock_hook = MODELS_CONFIG_MAP.get(stock_name(vllm_config.model_config.architecture))
        if stock_hook is not None:
            stock_hook.verify_and_update_config(vllm_config)
        if vllm_config.cache_config.mamba_ssm_cache_dtype == "auto":
            vllm_config.cache_config.mamba_ssm_cache_dtype = "float32"
        if options.filter:
            _refuse_unsupported(vllm_config)
            table = _resolve_table(vllm_config, options)
            vllm_config.additional_config = {
                **vllm_config.additional_config,
                KEY: {**options.to_dict(), "table": str(table)},
            }

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Part of vLLM's hook interface; nothing to do here."""


def _resolve_table(vllm_config: Any, options: Any) -> Any:
    from vllm_longmamba.table_lookup import find_table, locate_weights
    from vllm_longmamba.tables import load_table

    model_config = vllm_config.model_config
    path = find_table(model_config.model, locate_weights(model_config, vllm_config.load_config), options)
    table = load_table(path)
    logger.info(
        "LongMamba: thresholds from %s (training length %d, clamp %g %%, min_retention %g)",
        path,
        table.metadata.train_length,
        table.metadata.clamp_percent,
        options.min_retention if options.min_retention is not None else table.metadata.min_retention,
    )
    longest = int(table.row_lengths[-1])
    if longest < model_config.max_model_len:
        logger.warning(
            "LongMamba: the table %s ends at prompts of %d tokens; longer ones, up to max_model_len %d, are filtered "
            "with its last row. `longmamba calibrate --max-length %d` makes a longer table.",
            path,
            longest,
            model_config.max_model_len,
            model_config.max_model_len,
        )
    return path


def _refuse_unsupported(vllm_config: Any) -> None:
    if vllm_config.speculative_config is not None:
        raise ValueError(
            "--model-impl longmamba does not support speculative decoding, where draft and prompt tokens share a step; "
            "leave --speculative-config out"
        )
    if vllm_config.cache_config.use_replayssm:
        raise ValueError("--model-impl longmamba does not support --use-replayssm: leave it out")
