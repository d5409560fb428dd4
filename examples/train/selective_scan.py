"""The Mamba-1 recurrence over whole sequences, with gradients: Triton kernels on a GPU, plain torch elsewhere."""

import os

import torch
import torch.nn.functional as F  # noqa: N812

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def selective_scan(
    x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, seq_idx: torch.Tensor
) -> torch.Tensor:
    """y_t = C_t h_t with h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t, from an empty state; with gradients of all.

    Args:
        x: (batch, tokens, d_inner).
        dt: (batch, tokens, d_inner) float32, after softplus.
        A: (d_inner, d_state) float32, negative.
        B, C: (batch, tokens, d_state).
        seq_idx: (tokens,) int32, which sequence of its row a token is of; the state is emptied between sequences.

    Returns:
        (batch, tokens, d_inner), dtype of x. The kernels compute in float32, the reference in the dtype of A.

    Raises:
        ValueError: shapes that do not belong together.
    """
    (batch, tokens, d_inner), d_state = x.shape, A.shape[1]
    shapes = [tuple(values.shape) for values in (dt, A, B, C, seq_idx)]
    expected = [(batch, tokens, d_inner), (d_inner, d_state), *2 * [(batch, tokens, d_state)], (tokens,)]
    if shapes != expected:
        raise ValueError(
            f"selective_scan: dt, A, B, C, seq_idx for x {tuple(x.shape)} must be {expected}, got {shapes}"
        )
    goes_on = F.pad((seq_idx[1:] == seq_idx[:-1]).float(), (1, 0))
    if x.is_cuda or IS_INTERPRETED:
        y, _ = _scan(x, dt, A, B, C, goes_on)
        return y
    return selective_scan_reference(x, dt, A, B, C, goes_on)


def selective_scan_reference(
    x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, goes_on: torch.Tensor
) -> torch.Tensor:
    """The same by a loop over tokens, with autograd's gradients; goes_on (tokens,): 0 where the state is emptied."""
    decay = (dt[..., None] * A).exp()  # (batch, tokens, d_inner, d_state)
    feed = (dt * x)[..., None] * B[:, :, None]
    state = torch.zeros_like(feed[:, 0])
    states = []
    for t in range(x.shape[1]):
        state = goes_on[t] * decay[:, t] * state + feed[:, t]
        states.append(state)
    return torch.einsum("btdn,btn->btd", torch.stack(states, 1), C.to(state.dtype)).to(x.dtype)


@torch.library.custom_op("longmamba_train::selective_scan", mutates_args=())
def _scan(
    x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, goes_on: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """y and the states before every chunk of tokens, which the backward pass starts from."""
    from .selective_scan_triton import scan_forward

    return scan_forward(*(values.contiguous() for values in (x, dt, A, B, C, goes_on)))


@_scan.register_fake
def _(
    x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, goes_on: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    from .selective_scan_triton import chunk_states_shape

    return torch.empty(x.shape, dtype=x.dtype, device=x.device), x.new_empty(
        chunk_states_shape(x, A), dtype=torch.float32
    )


@torch.library.custom_op("longmamba_train::selective_scan_backward", mutates_args=())
def _scan_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    goes_on: torch.Tensor,
    chunk_states: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    from .selective_scan_triton import scan_backward

    return scan_backward(*(values.contiguous() for values in (dy, x, dt, A, B, C, goes_on, chunk_states)))


@_scan_backward.register_fake
def _(
    dy: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    goes_on: torch.Tensor,
    chunk_states: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    dx, ddt, dA, dB, dC = (
        torch.empty(values.shape, dtype=values.dtype, device=values.device) for values in (x, dt, A, B, C)
    )
    return dx, ddt, dA, dB, dC


def _keep(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[torch.Tensor, ...], output: object) -> None:
    # otherwise zeros would be made for a gradient of the states
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, output[1])  # type: ignore[index]


def _gradients(
    ctx: torch.autograd.function.FunctionCtx, dy: torch.Tensor, _: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    return *_scan_backward(dy, *ctx.saved_tensors), None  # type: ignore[attr-defined]


_scan.register_autograd(_gradients, setup_context=_keep)
