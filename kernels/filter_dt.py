"""The LongMamba filter by itself, for kernels that read a raw dt (Mamba-2, and decode)."""

import torch

from .dispatch import check_tensor, uses_triton
from .reference import filter_dt_reference

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def filter_dt_(dt: torch.Tensor, dt_bias: torch.Tensor, dt_threshold: torch.Tensor, token_rows: torch.Tensor) -> None:
    """Set a raw dt to -inf wherever LongMamba filters it, so that any kernel's softplus makes it exactly 0.

    ``dt[t, c] = -inf`` where ``softplus(dt[t, c] + dt_bias[c]) <= dt_threshold[token_rows[t], c]``, computed in
    float32. The state of that channel is then neither decayed nor fed by that token. LongMamba (arXiv 2504.16053),
    equation 6.

    The launch depends on shapes only and nothing is read back, so a CUDA graph may capture it; tokens of row 0 are
    not even read.

    Args:
        dt: (tokens, channels) float32, bfloat16 or float16, before bias and softplus. Last stride 1, any row stride
            (a column slice of a wider projection). Changed in place, only where filtered.
        dt_bias: (channels,) floating point, contiguous.
        dt_threshold: (rows, channels) float32, contiguous, in units of dt after softplus. Row 0 is -1 throughout
            (nothing filtered); a local channel has -1 in every row.
        token_rows: (tokens,) int32, contiguous; 0 for tokens that are not to be filtered.

    Raises:
        ValueError: for a wrong shape, dtype, stride or device.
    """
    if dt.dim() != 2:
        raise ValueError(f"dt must have shape (tokens, channels), got {tuple(dt.shape)}")
    tokens, channels = dt.shape
    check_tensor("dt", dt, (tokens, channels), FLOATS, dt.device, contiguous=False)
    check_tensor("dt_bias", dt_bias, (channels,), FLOATS, dt.device)
    rows = dt_threshold.shape[0] if dt_threshold.dim() == 2 else 1
    check_tensor("dt_threshold", dt_threshold, (rows, channels), (torch.float32,), dt.device)
    check_tensor("token_rows", token_rows, (tokens,), (torch.int32,), dt.device)
    if uses_triton(dt):
        from .filter_dt_triton import filter_dt_triton_

        filter_dt_triton_(dt, dt_bias, dt_threshold, token_rows)
    else:
        filter_dt_reference(dt, dt_bias, dt_threshold, token_rows)
