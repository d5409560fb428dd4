"""The kernels of our prefill by class, and the least time that an H200 can take for each.

Floors are those of one Mamba layer in bfloat16. Bytes: every input read once and every output written once, the weights
of products once a step; states, small beside the tokens, are left out. Arithmetic: of products with weights all; of the
Mamba-1 scan one exponential a token, channel and state; of SSD its matrix products, where a block of BLOCK tokens is
multiplied as a whole. Attention and MLP of a hybrid have no floor.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .h200 import BYTES_PER_US, EXPONENTIALS_PER_US, FLOPS_PER_US
from .shapes import model_config

PRODUCTS, CONVOLUTION, GATED_NORM, ADD_AND_NORM = "products", "convolution", "gated norm", "add and norm"
SCAN, REST = "scan or SSD", "rest"
CLASSES = (PRODUCTS, SCAN, CONVOLUTION, GATED_NORM, ADD_AND_NORM, REST)

_PATTERNS = {
    SCAN: r"selective_scan|selective_state_update|^_ssd_|^_filter_dt|^_(chunk_\w+|state_passing|bmm_chunk)_fwd_kernel",
    CONVOLUTION: r"causal_conv1d",
    GATED_NORM: r"^_gated_norm_kernel|^_layer_norm_fwd_1pass_kernel|^triton_\w*rsqrt_silu",
    ADD_AND_NORM: r"^triton_\w*rms_norm|fused_add_rms_norm",
    PRODUCTS: r"nvjet|gemm|cublas|^_small_product_kernel",
}
# Calls a layer and step below which a kernel is not one of the Mamba layers': the lm head has one a step, attention and
# MLP of a hybrid some for each of its few layers. All layers have the same products; norms are compiled in some ways.
_LEAST_CALLS = {PRODUCTS: 1.0, ADD_AND_NORM: 0.5}
# Tokens a block of SSD, as in kernels/ssd_triton.py.
BLOCK = 32
_ITEM_BYTES = 2


class LayerShape(NamedTuple):
    """Of a model's Mamba layers. dt_rank 0: Mamba-2; nheads 0: Mamba-1."""

    layers: int
    d_model: int
    d_inner: int
    d_state: int
    dt_rank: int = 0
    nheads: int = 0
    ngroups: int = 1


class Floor(NamedTuple):
    """Microseconds a layer, of bytes and of arithmetic."""

    bytes: float
    arithmetic: float = 0.0


def layer_shape(config: Any) -> LayerShape:
    """The shape of the layers of a transformers configuration of `shapes.model_config`."""
    sizes = (config.num_hidden_layers, config.hidden_size)
    if config.model_type == "mamba2":
        inner = config.num_heads * config.head_dim
        return LayerShape(*sizes, inner, config.state_size, nheads=config.num_heads, ngroups=config.n_groups)
    if config.model_type == "zamba2":
        heads = config.n_mamba_heads
        inner = heads * config.mamba_headdim
        return LayerShape(*sizes, inner, config.mamba_d_state, nheads=heads, ngroups=config.mamba_ngroups)
    return LayerShape(*sizes, config.intermediate_size, config.state_size, dt_rank=config.time_step_rank)


def floors(shape: LayerShape, tokens: int, steps: int) -> dict[str, Floor]:
    """By class, without the rest.

    Args:
        shape: of a layer.
        tokens: of the prompt.
        steps: in which it is read.
    """
    _, d_model, d_inner, d_state, dt_rank, nheads, ngroups = shape
    B_and_C = 2 * ngroups * d_state
    conv_channels = d_inner + B_and_C if nheads else d_inner
    if nheads:
        # features in and out of in_proj and out_proj
        products = [(d_model, d_inner + conv_channels + nheads), (d_inner, d_model)]
        # x, the output, B, C, dt
        scanned = 2 * d_inner + B_and_C + nheads
        # what goes into the state and out of it; C B^T of a group, and its product with x
        flops = 4 * d_inner * d_state + 2 * BLOCK * (ngroups * d_state + d_inner)
        scan_arithmetic = tokens * flops / FLOPS_PER_US
    else:
        # in_proj, x_proj, dt_proj, out_proj
        products = [(d_model, 2 * d_inner), (d_inner, dt_rank + B_and_C), (dt_rank, d_inner), (d_inner, d_model)]
        # x, dt, z, the output, B, C
        scanned = 4 * d_inner + B_and_C
        scan_arithmetic = tokens * d_inner * d_state / EXPONENTIALS_PER_US
    read_and_written = sum(tokens * (K + N) + steps * K * N for K, N in products)
    found = {
        PRODUCTS: Floor(_bytes(read_and_written), sum(2 * tokens * K * N for K, N in products) / FLOPS_PER_US),
        SCAN: Floor(_bytes(tokens * scanned), scan_arithmetic),
        CONVOLUTION: Floor(_bytes(tokens * 2 * conv_channels)),
        # the hidden states and the residual, both in and out
        ADD_AND_NORM: Floor(_bytes(tokens * 4 * d_model)),
    }
    if nheads:
        # the scan's output, the gate, the result
        found[GATED_NORM] = Floor(_bytes(tokens * 3 * d_inner))
    return found


def kernel_class(name: str, calls_a_layer: float) -> str:
    """The class of a kernel.

    Args:
        name: as the profiler has it.
        calls_a_layer: calls in a step, divided by the number of layers.
    """
    for found, pattern in _PATTERNS.items():
        if re.search(pattern, name, re.IGNORECASE):
            return found if calls_a_layer >= _LEAST_CALLS.get(found, 0.0) else REST
    return REST


def by_class(kernels: Mapping[str, Sequence[float]], layers: int, steps: int) -> dict[str, float]:
    """Microseconds a layer of each class. A kernel that a hybrid's attention or MLP shares with the layers is theirs.

    Args:
        kernels: by name, microseconds and calls of the whole prefill.
        layers: of the model.
        steps: in which the prompt was read.
    """
    times = dict.fromkeys(CLASSES, 0.0)
    for name, (time, calls) in kernels.items():
        times[kernel_class(name, calls / (layers * steps))] += time / layers
    return times


def floor_lines(model: str, tokens: int, profiled: Mapping[str, Any], tiny: bool = False) -> list[str]:
    """A table of our kernels against their floors.

    Args:
        model: one of `shapes.MODELS`.
        tokens: of the prompt.
        profiled: its steps and kernels, see `stop_prompts`.
        tiny: as in `model_config`.
    """
    shape = layer_shape(model_config(model, tiny))
    steps = profiled["steps"]
    least = floors(shape, tokens, steps)
    times = by_class(profiled["kernels"], shape.layers, steps)
    lines = [
        f"| our kernels against their floors, prefill {tokens:,} | us a layer | bytes us | arithmetic us |",
        "|---|---|---|---|",
    ]
    for name, time in times.items():
        floor = least.get(name)
        if name == GATED_NORM and floor is None and not time:
            continue
        of_bytes = f"{floor.bytes:.1f}" if floor else ""
        arithmetic = f"{floor.arithmetic:.1f}" if floor and floor.arithmetic else ""
        lines.append(f"| {name} | {time:.1f} | {of_bytes} | {arithmetic} |")
    lines.append(f"| all | {sum(times.values()):.1f} | | |")
    return lines


def _bytes(numbers: float) -> float:
    """Microseconds of so many bfloat16 numbers, read or written."""
    return _ITEM_BYTES * numbers / BYTES_PER_US
