"""Weights that are loaded into a running engine: only those that its thresholds were made for."""

import copy
from typing import Any

from vllm_longmamba.calibration.settings import from_config
from vllm_longmamba.checkpoint.table_lookup import locate_weights
from vllm_longmamba.options import options_from_config
from vllm_longmamba.tables import read_metadata

_SERVE_PLAIN = """serve the plain model with --additional-config '{"longmamba": {"filter": false}}'"""
_REMEDY = f"start a new engine for other weights, which finds or makes their table, or {_SERVE_PLAIN}"


def refuse_weight_transfer(vllm_config: Any) -> None:
    """Refuse at the start what lets a trainer replace the weights of a running engine.

    Raises:
        ValueError: it is set.
    """
    if vllm_config.weight_transfer_config is not None:
        raise ValueError(
            "--model-impl longmamba does not support --weight-transfer-config, because thresholds belong to the "
            f"weights; leave it out, or {_SERVE_PLAIN}"
        )


def check_reload(
    vllm_config: Any, weights_iterator: Any = None, weights_path: str | None = None, is_checkpoint_format: bool = True
) -> None:
    """Refuse to reload other weights than the engine started with. Nothing is changed.

    Args:
        vllm_config: the worker's configuration.
        weights_iterator: weights that come from elsewhere than a checkpoint.
        weights_path: the checkpoint; by default the model's.
        is_checkpoint_format: as vLLM's `reload_weights` has it; decides nothing here.

    Raises:
        ValueError: the weights are others, or cannot be checked.
    """
    options = options_from_config(vllm_config.additional_config)
    if not options.filter:
        return
    if weights_iterator is not None:
        raise ValueError(
            "--model-impl longmamba: weights can be reloaded from a checkpoint only, which is compared with the "
            f"threshold table, but an iterator came; {_REMEDY}"
        )
    model_config = copy.copy(vllm_config.model_config)
    if weights_path is not None:
        model_config.model, model_config.revision = weights_path, None
    found = locate_weights(model_config, vllm_config.load_config).fingerprint
    if options.table is not None:
        expected = read_metadata(options.table).weights_fingerprint
    else:
        expected = from_config(vllm_config.additional_config)[0].weights_fingerprint
    if found != expected:
        raise ValueError(
            f"--model-impl longmamba: the thresholds were made for weights {expected[:12]}, but the weights to be "
            f"reloaded from {model_config.model!r} are {found[:12]}; {_REMEDY}"
        )
