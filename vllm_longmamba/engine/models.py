"""The LongMamba variants of vLLM's model classes: the same models, built of LongMamba mixers.

A variant is made when it is first asked for, as an attribute of this module: `LongMambaForCausalLM`,
`LongMamba2ForCausalLM`, `LongZamba2ForCausalLM`, ... (see architectures.py).
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, ClassVar

import torch
from vllm.distributed.parallel_state import (
    get_pp_group,
    get_tensor_model_parallel_world_size,
)
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.models.utils import WeightsMapper

from vllm_longmamba.architectures import MODEL_IMPL, stock_name, supported, supported_by, variant_name
from vllm_longmamba.calibration.settings import from_config
from vllm_longmamba.checkpoint.loaded_weights import complete_weights
from vllm_longmamba.checkpoint.table_lookup import weight_patterns
from vllm_longmamba.engine.patches import apply_patches
from vllm_longmamba.layers.filtered_mixer import FilteredMixer, filtered_mixers
from vllm_longmamba.layers.mamba1 import LongMambaMixer
from vllm_longmamba.layers.mamba2 import LongMambaMixer2
from vllm_longmamba.layers.prompt_filter import PromptFilter
from vllm_longmamba.layers.replace_table import replace_table
from vllm_longmamba.options import options_from_config
from vllm_longmamba.tables import ThresholdTable, load_table

_ORIGINAL_NAMES = WeightsMapper(orig_to_new_prefix={"backbone.embedding.": "backbone.embeddings."})
_TABLE_TENSORS = "longmamba."


class LongMambaModel:
    """Mixin in front of a vLLM model class.

    Attributes:
        mixers: by which of this plugin's each of vLLM's mixers is replaced.
    """

    mixers: ClassVar[dict[str, type]] = {"MambaMixer": LongMambaMixer, "MambaMixer2": LongMambaMixer2}

    def __init__(self, *, vllm_config: Any, prefix: str = "", **kwargs: Any) -> None:
        """Build the stock model of this plugin's mixers and set them up.

        Raises:
            ValueError: the threshold table does not fit the model.
            RuntimeError: the stock class no longer builds its layers from vLLM's Mamba mixers.
        """
        apply_patches(in_worker=True)
        with _built_of(self.mixers):
            super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)  # type: ignore[call-arg]
        mixers = _number_mixers(self)
        if mixers:
            self._set_up(mixers, vllm_config)
        self._awaits_checkpoint = vllm_config.load_config.load_format != "dummy"
        if self._awaits_checkpoint:
            self.allow_patterns_overrides = weight_patterns(vllm_config.model_config)

    def _set_up(self, mixers: list[Any], vllm_config: Any) -> None:
        """Give the mixers their thresholds."""
        options = options_from_config(vllm_config.additional_config)
        if options.filter:
            replace_table(self, PromptFilter.from_options(_table(vllm_config, mixers), options))

    @staticmethod
    def get_model_state_cls() -> type:
        """vLLM's public hook for the state of model runner V2."""
        from vllm_longmamba.engine.model_state import LongMambaModelState

        return LongMambaModelState

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load weights as the stock class does; the tensors of a threshold table beside them are passed over.

        Raises:
            ValueError: the first call, which brings the checkpoint, leaves a parameter without a weight. Later ones may
                replace some only.
        """
        own = ((name, tensor) for name, tensor in weights if not name.startswith(_TABLE_TENSORS))
        loaded: set[str] = super().load_weights(own)  # type: ignore[misc]
        if self._awaits_checkpoint:
            complete_weights(self, loaded)
            self._awaits_checkpoint = False
        return loaded


def _table(vllm_config: Any, mixers: list[FilteredMixer]) -> ThresholdTable:
    """The table that the front end found, or an empty one for that which the engine is going to make."""
    options = options_from_config(vllm_config.additional_config)
    if options.table is not None:
        return load_table(options.table)
    to_make = from_config(vllm_config.additional_config)
    assert to_make, "the front end finds a table or plans one"
    ranks = get_tensor_model_parallel_world_size()
    return to_make[0].empty_table({mixer.layer_index: mixer.A.shape[0] * ranks for mixer in mixers})


def _number_mixers(model: Any) -> list[FilteredMixer]:
    """Tell each mixer its layer, from the name of its module: its `prefix` counts otherwise in some hybrids."""
    for name, module in model.named_modules():
        if isinstance(module, FilteredMixer):
            match = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
            if match is None:
                raise RuntimeError(f"{type(model).__name__}: the Mamba mixer {name!r} is in no numbered layer")
            module.layer_index = int(match.group(1))
    mixers = filtered_mixers(model)
    if not mixers and get_pp_group().world_size == 1:
        raise RuntimeError(f"{type(model).__name__}: vLLM built this model without Mamba mixers")
    return mixers


@contextmanager
def _built_of(mixers: dict[str, type]) -> Iterator[None]:
    """Let vLLM's pluggable mixers be built as others, for the duration of one model's construction."""
    before = {name: op_registry_oot.get(name) for name in mixers}
    op_registry_oot.update(mixers)
    try:
        yield
    finally:
        for name, mixer in before.items():
            if mixer is None:
                del op_registry_oot[name]
            else:
                op_registry_oot[name] = mixer


def make_variant(name: str, model_impl: str, mixin: type, module: str) -> type:
    """The variant of a vLLM model class.

    Args:
        name: of the variant.
        model_impl: the plugin's value of --model-impl that it is for.
        mixin: to stand in front of vLLM's class.
        module: that the variant is an attribute of.

    Raises:
        AttributeError: there is no such variant.
    """
    architecture = stock_name(name)
    if architecture not in supported_by(model_impl) or name != variant_name(architecture, model_impl):
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    vllm_module, class_name = supported()[architecture]
    stock = getattr(import_module(f"vllm.model_executor.models.{vllm_module}"), class_name)
    attributes: dict[str, Any] = {
        "__module__": module,
        "__doc__": f"vLLM's {class_name} for --model-impl {model_impl}.",
    }
    if vllm_module in ("mamba", "mamba2"):
        attributes["hf_to_vllm_mapper"] = stock.hf_to_vllm_mapper | _ORIGINAL_NAMES
    return type(name, (mixin, stock), attributes)


def __getattr__(name: str) -> type:
    variant = make_variant(name, MODEL_IMPL, LongMambaModel, __name__)
    globals()[name] = variant
    return variant
