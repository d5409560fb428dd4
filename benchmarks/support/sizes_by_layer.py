"""A worker extension of vLLM: the decode kernels of each layer have launch sizes of their own.

vLLM imports it in the process of the model, before it captures CUDA graphs. The environment variable LAYER_SIZES says,
as JSON, {"update": [[channels, warps], ...], "conv": [[sequences, channels, warps], ...]}: layer i takes the i-th,
counted in a circle.
"""

import json
import os
from collections.abc import Callable
from typing import Any

from vllm_longmamba.kernels import causal_conv1d_update_triton as conv_module
from vllm_longmamba.kernels import selective_state_update_triton as update_module
from vllm_longmamba.layers.filtered_mixer import FilteredMixer

SIZES = {name: [tuple(sizes) for sizes in given] for name, given in json.loads(os.environ["LAYER_SIZES"]).items()}
# Layer indices in the order in which layers first run.
LAYERS: dict[int, int] = {}


class SizesByLayer:
    """Nothing: what the extension does is done when it is imported."""


def _with_sizes(method: Callable[..., Any], kernel: str, use: Callable[[tuple[int, ...]], None]) -> Callable[..., Any]:
    def run(mixer: Any, *args: Any, **kwargs: Any) -> Any:
        number = LAYERS.setdefault(mixer.layer_index, len(LAYERS))
        use(SIZES[kernel][number % len(SIZES[kernel])])
        return method(mixer, *args, **kwargs)

    return run


def _use_for_updates(sizes: tuple[int, ...]) -> None:
    update_module._launch_sizes = lambda *shape: sizes
    update_module.PROJECTION_SIZES = sizes


def _use_for_convolutions(sizes: tuple[int, ...]) -> None:
    conv_module._launch_sizes = lambda batch: sizes


FilteredMixer._run_decode = _with_sizes(FilteredMixer._run_decode, "update", _use_for_updates)
FilteredMixer._convolve_decodes = _with_sizes(FilteredMixer._convolve_decodes, "conv", _use_for_convolutions)
