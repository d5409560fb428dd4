"""What `--model-impl longmamba` changes in vLLM's configuration, all of it before any weight is loaded."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm_longmamba.architectures import stock_name
from vllm_longmamba.checkpoint.original_config import ORIGINAL_FORMAT_ATTRIBUTE
from vllm_longmamba.checkpoint.time_step_limit import check_time_step_limit
from vllm_longmamba.checkpoint.train_length import set_default_length
from vllm_longmamba.engine.refusals import refuse_unsupported
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
    check_time_step_limit(getattr(model_config.hf_text_config, "time_step_limit", None), "time_step_limit")
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

        The path of the table found replaces the option `table`, so that every worker reads the same file. Where none is
        found, the plan is added by which the engine calibrates itself.

        Args:
            vllm_config: vLLM's configuration, changed in place.

        Raises:
            ValueError: a wrong option, a wrong table, none and no way to make one, or a feature that is not supported.
        """
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP

        from vllm_longmamba.calibration.settings import CALIBRATION_KEY
        from vllm_longmamba.engine.reload import refuse_weight_transfer

        options = options_from_config(vllm_config.additional_config)
        stock_hook = MODELS_CONFIG_MAP.get(stock_name(vllm_config.model_config.architecture))
        if stock_hook is not None:
            stock_hook.verify_and_update_config(vllm_config)
        refuse_unsupported(vllm_config)
        if options.filter:
            refuse_weight_transfer(vllm_config)
            resolved = _resolve_table(vllm_config, options)
            given = {name: value for name, value in vllm_config.additional_config.items() if name != CALIBRATION_KEY}
            vllm_config.additional_config = {**given, **resolved}

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Part of vLLM's hook interface; nothing to do here."""


def _resolve_table(vllm_config: Any, options: Any) -> dict[str, Any]:
    """The entries of the additional config that tell all processes where the thresholds come from."""
    from vllm_longmamba.calibration.settings import from_config
    from vllm_longmamba.checkpoint.table_lookup import locate_weights, search_table

    model_config = vllm_config.model_config
    weights = locate_weights(model_config, vllm_config.load_config)
    asked = [settings for settings in from_config(vllm_config.additional_config) if not settings.weights_fingerprint]
    if asked:
        return _calibrate_as_asked(asked, vllm_config, options, weights.fingerprint)
    path = search_table(weights, options, model_config.quantization)
    if path is not None and options.filter_generated and options.table is None:
        path, options = _without_end(path, options)
    if path is not None:
        _announce_table(path, model_config, options)
        return {KEY: {**options.to_dict(), "table": str(path)}}
    return _plan_calibration(vllm_config, options, weights.fingerprint)


def _without_end(path: Path, options: Any) -> tuple[Path | None, Any]:
    """Pass a table over that nobody named and that leaves ends unfiltered: not with generated tokens behind them.

    Returns:
        The table, None where it is passed over; and the options, with its training length in that case.
    """
    from vllm_longmamba.tables import read_metadata

    found = read_metadata(path)
    if not found.unfiltered_end or options.unfiltered_end is not None:
        return path, options
    logger.warning(
        "LongMamba: %s leaves the ends of prompts unfiltered, which cannot be with filter_generated; looking for what "
        "an earlier start has made, or making another one",
        path,
    )
    return None, replace(options, train_length=found.train_length)


def _calibrate_as_asked(asked: Any, vllm_config: Any, options: Any, fingerprint: str) -> dict[str, Any]:
    """What `longmamba calibrate` asks for, whatever tables there are."""
    from vllm_longmamba.calibration.prepare import calibration_obstacle, complete
    from vllm_longmamba.calibration.settings import to_config

    obstacle = calibration_obstacle(vllm_config)
    if obstacle is not None:
        raise ValueError(f"this engine cannot calibrate: {obstacle}; leave that argument out")
    return {
        KEY: options.to_dict(),
        **to_config([complete(settings, vllm_config, fingerprint) for settings in asked]),
    }


def _plan_calibration(vllm_config: Any, options: Any, fingerprint: str) -> dict[str, Any]:
    """What an engine is to do at its start that found no table."""
    from vllm_longmamba.calibration.at_start import read_stored, warn_of_short_prompts
    from vllm_longmamba.calibration.prepare import calibration_obstacle, settings_of_engine
    from vllm_longmamba.calibration.settings import to_config
    from vllm_longmamba.checkpoint.table_lookup import no_table

    settings = settings_of_engine(vllm_config, options, fingerprint)
    max_model_len = vllm_config.model_config.max_model_len
    if not settings.can_filter(max_model_len):
        warn_of_short_prompts(settings, max_model_len)
        return {KEY: {**options.to_dict(), "filter": False}}
    obstacle = calibration_obstacle(vllm_config) if options.calibrate else "the option calibrate is off"
    if obstacle is not None:
        if settings.store is None or read_stored(settings) is None:
            if options.filter_generated:
                obstacle += "; with filter_generated, add --unfiltered-end 0 to the following command"
            raise no_table(vllm_config.model_config.model, obstacle)
        _announce_table(Path(settings.store), vllm_config.model_config, options)
        return {KEY: {**options.to_dict(), "table": settings.store}}
    logger.info(
        "LongMamba: no threshold table for %s yet; the engine makes one at its start, or takes what it made at an "
        "earlier one",
        vllm_config.model_config.model,
    )
    return {KEY: options.to_dict(), **to_config([settings])}


def _announce_table(path: Path, model_config: Any, options: Any) -> None:
    from vllm_longmamba.layers.prompt_filter import PromptFilter
    from vllm_longmamba.tables import load_table

    table = load_table(path)
    end = PromptFilter.from_options(table, options).unfiltered_end
    logger.info(
        "LongMamba: thresholds from %s (training length %d, clamp %g %%, min_retention %g)%s",
        path,
        table.metadata.train_length,
        table.metadata.clamp_percent,
        options.min_retention if options.min_retention is not None else table.metadata.min_retention,
        f"; the last {end} tokens of prompts are not filtered" if end else "",
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
