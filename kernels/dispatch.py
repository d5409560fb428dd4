"""Which backend runs a tensor, and the checks that every wrapper makes at its boundary."""

import os
from functools import cache

import torch

# What activations, weights and states may hold.
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
# Where the engine's metadata of a step begins: parts of longer tensors, that begin anywhere. A kernel reads single
# numbers there and has nothing of their alignment, but would be compiled anew for each.
UNALIGNED = (
    "query_start_loc_ptr", "state_indices_ptr", "has_initial_state_ptr", "seq_rows_ptr",
    "seq_prompt_tokens_ptr", "token_rows_ptr", "checkpoints_ptr",
)  # fmt: skip


def uses_triton(tensor: torch.Tensor) -> bool:
    """True on a GPU, and on the CPU where ``TRITON_INTERPRET=1`` asks for Triton's interpreter.

    Meta tensors ask for what a GPU would run to be compiled, see :mod:`kernels.compile_ahead`.
    """
    return tensor.is_cuda or tensor.is_meta or os.environ.get("TRITON_INTERPRET", "0") == "1"


def is_nvidia(device: torch.device) -> bool:
    """Whether tensors there are for kernels on NVIDIA GPUs; those without memory are for the GPU of this machine."""
    return device.type in ("cuda", "meta") and torch.version.hip is None


@cache
def supports_dependent_launch(device: torch.device) -> bool:
    """Whether a kernel may start while the one in front of it ends: NVIDIA GPUs of compute capability 9.0 and later."""
    gpu = device if device.type == "cuda" else None
    return is_nvidia(device) and torch.cuda.get_device_capability(gpu) >= (9, 0)


def check_tensor(
    name: str,
    tensor: torch.Tensor,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
    contiguous: bool = True,
) -> None:
    """Check one argument without touching its data.

    Args:
        name: its name, for the message.
        tensor: the argument.
        shape: what it must be.
        dtypes: what it may hold.
        device: where it must be.
        contiguous: whether all of it must be contiguous; otherwise only its last dimension must.

    Raises:
        ValueError: naming the argument, the rule, what came, and what to do.
    """
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
    if tensor.dtype not in dtypes:
        allowed = " or ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"{name} must be {allowed}, got {tensor.dtype}; convert it before the call")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device} like the other arguments, got {tensor.device}")
    if contiguous and not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}; call .contiguous()")
    if not contiguous and shape[-1] > 1 and tensor.numel() and tensor.stride(-1) != 1:
        raise ValueError(
            f"{name}'s last dimension must have stride 1 (tokens-major layout), got strides {tensor.stride()}"
        )
