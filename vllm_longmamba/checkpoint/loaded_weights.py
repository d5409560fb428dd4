"""After a checkpoint is loaded: a tied head that vLLM left empty is tied, and other empty parameters are refused."""

from typing import Any

import torch

_HEAD = "lm_head.weight"


def complete_weights(model: Any, loaded: set[str]) -> None:
    """Makes sure that a checkpoint has filled every parameter of a model, which vLLM does not check for all layers.

    Where config.json ties the head to the embedding and the checkpoint has no head, the head becomes the embedding, in
    place. Parameters of quantized layers are not looked at: their scales need not be in the checkpoint.

    Args:
        model: vLLM's model, or this rank's part of it.
        loaded: names of its parameters that were loaded, as `load_weights` returns them.

    Raises:
        ValueError: parameters that nothing has filled; the message names them.
    """
    empty = [names[0] for names in _checked_parameters(model) if not loaded.intersection(names)]
    if _HEAD in empty and getattr(model, "is_pooling_model", False):
        # It has one, which nothing runs.
        empty.remove(_HEAD)
    if _HEAD in empty and getattr(model.config, "tie_word_embeddings", False):
        embedding = _loaded_embedding(model, loaded)
        if embedding is not None:
            model.lm_head = model.lm_head.tie_weights(embedding)
            empty.remove(_HEAD)
    if empty:
        shown = ", ".join(empty[:10]) + (f" and {len(empty) - 10} more" if len(empty) > 10 else "")
        raise ValueError(
            f"--model-impl longmamba: the checkpoint must hold every weight of the model, but has none for {shown}; "
            "check that all its files are there and that config.json belongs to them"
        )


def _checked_parameters(model: torch.nn.Module) -> list[list[str]]:
    """All names of each parameter: a tied head, and a block that several layers share, have more than one."""
    found: dict[int, list[str]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        method = getattr(module, "quant_method", None)
        if method is not None and not type(method).__name__.startswith("Unquantized"):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.numel() > 0:
                found.setdefault(id(parameter), []).append(f"{prefix}.{name}" if prefix else name)
    return list(found.values())


def _loaded_embedding(model: torch.nn.Module, loaded: set[str]) -> Any:
    for name, module in model.named_modules():
        if name.endswith((".embed_tokens", ".embeddings")) and f"{name}.weight" in loaded:
            return module
    return None
