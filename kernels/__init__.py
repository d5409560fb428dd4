"""Kernels of LongMamba: PyTorch, Triton and numba only; nothing here knows vLLM or the threshold tables.

Each operation is one wrapper that checks its arguments and picks a backend: Triton on a GPU, numba or PyTorch on
the CPU. Both are imported on the first call, so that importing this package never fails for want of one.
"""

from .causal_conv1d import causal_conv1d
from .causal_conv1d_update import causal_conv1d_update
from .compile_ahead import PER_DECODE_TOKEN, compile_ahead
from .filter_dt import filter_dt_
from .gated_norm import gated_norm
from .norm_parts import norm_parts_
from .reference import (
    causal_conv1d_reference,
    causal_conv1d_update_reference,
    filter_dt_reference,
    gated_norm_reference,
    norm_parts_reference,
    selective_scan_reference,
    selective_state_update_reference,
    small_product_reference,
    ssd_reference,
)
from .selective_scan import selective_scan
from .selective_state_update import MOST_PROJECTED, selective_state_update
from .small_product import MOST_SMALL, most_small_tokens, small_product
from .ssd import ssd, ssd_supports

__all__ = [
    "MOST_PROJECTED",
    "MOST_SMALL",
    "PER_DECODE_TOKEN",
    "causal_conv1d",
    "causal_conv1d_reference",
    "causal_conv1d_update",
    "causal_conv1d_update_reference",
    "compile_ahead",
    "filter_dt_",
    "filter_dt_reference",
    "gated_norm",
    "gated_norm_reference",
    "most_small_tokens",
    "norm_parts_",
    "norm_parts_reference",
    "selective_scan",
    "selective_scan_reference",
    "selective_state_update",
    "selective_state_update_reference",
    "small_product",
    "small_product_reference",
    "ssd",
    "ssd_reference",
    "ssd_supports",
]
