"""Kernels of LongMamba: PyTorch, Triton and numba only; nothing here knows vLLM or the threshold tables.

Each operation is one wrapper that checks its arguments and picks a backend: Triton on a GPU, numba or PyTorch on
the CPU. Both are imported on the first call, so that importing this package never fails for want of one.
"""

from .causal_conv1d import causal_conv1d
from .compile_ahead import PER_DECODE_TOKEN, compile_ahead
from .filter_dt import filter_dt_
from .filtered_scan import filtered_scan
from .filtered_state_update import filtered_state_update
from .reference import (
    causal_conv1d_reference,
    filter_dt_reference,
    filtered_scan_reference,
    filtered_ssd_reference,
    filtered_state_update_reference,
)
from .ssd_prefill import ssd_prefill, ssd_prefill_supports

__all__ = [
    "PER_DECODE_TOKEN",
    "causal_conv1d",
    "causal_conv1d_reference",
    "compile_ahead",
    "filter_dt_",
    "filter_dt_reference",
    "filtered_scan",
    "filtered_scan_reference",
    "filtered_ssd_reference",
    "filtered_state_update",
    "filtered_state_update_reference",
    "ssd_prefill",
    "ssd_prefill_supports",
]
