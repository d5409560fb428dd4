"""The DeciMamba variants of vLLM's model classes: `DeciMambaForCausalLM`, `DeciMamba2ForCausalLM`, ...

As in models.py, a variant is made when it is first asked for, as an attribute of this module.
"""

from typing import Any, ClassVar

from vllm_longmamba.architectures import DECIMAMBA
from vllm_longmamba.decimamba_options import options_from_config
from vllm_longmamba.engine.models import LongMambaModel, make_variant
from vllm_longmamba.layers.decimated_mamba1 import DeciMambaMixer
from vllm_longmamba.layers.decimated_mamba2 import DeciMambaMixer2


class DeciMambaModel(LongMambaModel):
    """Mixin in front of a vLLM model class; no thresholds, but layers that drop tokens."""

    mixers: ClassVar[dict[str, type]] = {"MambaMixer": DeciMambaMixer, "MambaMixer2": DeciMambaMixer2}

    def _set_up(self, mixers: list[Any], vllm_config: Any) -> None:
        """Tell the mixers which of them drop tokens."""
        options = options_from_config(vllm_config.additional_config)
        for mixer in mixers:
            mixer.set_decimation(options)


def __getattr__(name: str) -> type:
    variant = make_variant(name, DECIMAMBA, DeciMambaModel, __name__)
    globals()[name] = variant
    return variant
