"""Triton kernels of the Mamba-1 scan and its gradients.

One program has one sequence and BLOCK channels, with all their states as a tile (states, channels): one warp, a channel
a thread, so that sums over the states stay inside a thread. The forward pass keeps the state before every CHUNK tokens;
the backward pass walks over the chunks from the last to the first, computes the states of a chunk anew (they stay in
registers, hence CHUNK is small), and then its gradients from the last token to the first. Tokens behind the end have
dt = 0 and change nothing.
"""

# ruff: noqa: RUF005
# Triton's language has no starred tuples.

import torch
import triton
import triton.language as tl

BLOCK = 32
# Numbers a thread keeps of a chunk's states, CHUNK * d_state. 128 spill on an H200 (ptxas of Triton 3.6), 64 hardly do.
KEPT_STATES = 64
LARGEST_CHUNK = 4
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _forward_kernel(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, goes_on_ptr, y_ptr, chunk_states_ptr, tokens,
    d_inner: tl.constexpr, d_state: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """A block of channels of one sequence. N: d_state, padded to a power of two."""
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_channel = channel < d_inner
    n = tl.arange(0, N)
    is_state = n < d_state
    tile = is_state[:, None] & is_channel[None, :]
    # exp(dt A) = exp2(dt A log2(e))
    A = tl.load(A_ptr + channel[None, :] * d_state + n[:, None], mask=tile, other=0.0) * LOG2_E
    h = tl.zeros((N, BLOCK), tl.float32)
    first = tl.program_id(1).to(tl.int64) * tokens
    n_chunks = tl.cdiv(tokens, CHUNK)
    chunk_states_ptrs = chunk_states_ptr + tl.program_id(1).to(tl.int64) * n_chunks * (d_state * d_inner)
    chunk_states_ptrs += n[:, None] * d_inner + channel[None, :]

    for chunk in range(0, n_chunks):
        tl.store(chunk_states_ptrs, h, mask=tile)
        chunk_states_ptrs += d_state * d_inner
        for i in tl.static_range(CHUNK):
            t = chunk * CHUNK + i
            here = first + t
            own = is_channel & (channel * 0 + t < tokens)
            own_n = is_state & (n * 0 + t < tokens)
            x = tl.load(x_ptr + here * d_inner + channel, mask=own, other=0.0).to(tl.float32)
            dt = tl.load(dt_ptr + here * d_inner + channel, mask=own, other=0.0)
            B = tl.load(B_ptr + here * d_state + n, mask=own_n, other=0.0).to(tl.float32)
            C = tl.load(C_ptr + here * d_state + n, mask=own_n, other=0.0).to(tl.float32)
            goes_on = tl.load(goes_on_ptr + t, mask=t < tokens, other=0.0)
            h = h * (tl.exp2(dt[None, :] * A) * goes_on) + (dt * x)[None, :] * B[:, None]
            y = tl.sum(h * C[:, None], axis=0)
            tl.store(y_ptr + here * d_inner + channel, y.to(y_ptr.dtype.element_ty), mask=own)


@triton.jit
def _backward_kernel(
    dy_ptr, x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, goes_on_ptr, chunk_states_ptr,
    dx_ptr, ddt_ptr, dA_ptr, dB_ptr, dC_ptr, tokens, batch,
    d_inner: tl.constexpr, d_state: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """As `_forward_kernel`. dA is a sum of one sequence; dB and dC are sums over this block of channels."""
    block = tl.program_id(0)
    sequence = tl.program_id(1).to(tl.int64)
    channel = block * BLOCK + tl.arange(0, BLOCK)
    is_channel = channel < d_inner
    n = tl.arange(0, N)
    is_state = n < d_state
    tile = is_state[:, None] & is_channel[None, :]
    A = tl.load(A_ptr + channel[None, :] * d_state + n[:, None], mask=tile, other=0.0)
    first = sequence * tokens
    # dB and dC: (blocks, batch, tokens, d_state)
    first_sum = (block * batch + sequence) * tokens
    n_chunks = tl.cdiv(tokens, CHUNK)
    # the last chunk's
    chunk_states_ptrs = chunk_states_ptr + ((sequence + 1) * n_chunks - 1) * (d_state * d_inner)
    chunk_states_ptrs += n[:, None] * d_inner + channel[None, :]
    dA = tl.zeros((N, BLOCK), tl.float32)
    # what later tokens want of the state behind this one: dL/dh_t without y_t's part
    dh = tl.zeros((N, BLOCK), tl.float32)

    for step in range(0, n_chunks):
        chunk = n_chunks - 1 - step
        h = tl.load(chunk_states_ptrs, mask=tile, other=0.0)
        chunk_states_ptrs -= d_state * d_inner
        states = ()
        for i in tl.static_range(CHUNK):
            t = chunk * CHUNK + i
            here = first + t
            own = is_channel & (channel * 0 + t < tokens)
            own_n = is_state & (n * 0 + t < tokens)
            x = tl.load(x_ptr + here * d_inner + channel, mask=own, other=0.0).to(tl.float32)
            dt = tl.load(dt_ptr + here * d_inner + channel, mask=own, other=0.0)
            B = tl.load(B_ptr + here * d_state + n, mask=own_n, other=0.0).to(tl.float32)
            goes_on = tl.load(goes_on_ptr + t, mask=t < tokens, other=0.0)
            states = states + (h,)
            h = h * (tl.exp2(dt[None, :] * (A * LOG2_E)) * goes_on) + (dt * x)[None, :] * B[:, None]
        for i in tl.static_range(CHUNK):
            t = chunk * CHUNK + (CHUNK - 1 - i)
            here = first + t
            own = is_channel & (channel * 0 + t < tokens)
            own_n = is_state & (n * 0 + t < tokens)
            x = tl.load(x_ptr + here * d_inner + channel, mask=own, other=0.0).to(tl.float32)
            dt = tl.load(dt_ptr + here * d_inner + channel, mask=own, other=0.0)
            dy = tl.load(dy_ptr + here * d_inner + channel, mask=own, other=0.0).to(tl.float32)
            B = tl.load(B_ptr + here * d_state + n, mask=own_n, other=0.0).to(tl.float32)
            C = tl.load(C_ptr + here * d_state + n, mask=own_n, other=0.0).to(tl.float32)
            goes_on = tl.load(goes_on_ptr + t, mask=t < tokens, other=0.0)
            decay = tl.exp2(dt[None, :] * (A * LOG2_E)) * goes_on
            kept = states[CHUNK - 1 - i] * decay
            h = kept + (dt * x)[None, :] * B[:, None]
            dh += dy[None, :] * C[:, None]
            dC = tl.sum(dy[None, :] * h, axis=1)
            dB = tl.sum(dh * (dt * x)[None, :], axis=1)
            dfeed = tl.sum(dh * B[:, None], axis=0)
            dlog_decay = dh * kept
            ddt = tl.sum(dlog_decay * A, axis=0) + x * dfeed
            dA += dlog_decay * dt[None, :]
            dh = dh * decay
            tl.store(dx_ptr + here * d_inner + channel, (dt * dfeed).to(dx_ptr.dtype.element_ty), mask=own)
            tl.store(ddt_ptr + here * d_inner + channel, ddt, mask=own)
            tl.store(dB_ptr + (first_sum + t) * d_state + n, dB, mask=own_n)
            tl.store(dC_ptr + (first_sum + t) * d_state + n, dC, mask=own_n)
    tl.store(dA_ptr + (sequence * d_inner + channel[None, :]) * d_state + n[:, None], dA, mask=tile)


def _chunk_size(d_state: int) -> int:
    """CHUNK, in tokens."""
    return min(LARGEST_CHUNK, max(1, KEPT_STATES // triton.next_power_of_2(d_state)))


def chunk_states_shape(x: torch.Tensor, A: torch.Tensor) -> tuple[int, int, int, int]:
    """(batch, chunks, d_state, d_inner) for x (batch, tokens, d_inner) and A (d_inner, d_state)."""
    return x.shape[0], triton.cdiv(x.shape[1], _chunk_size(A.shape[1])), A.shape[1], A.shape[0]


def scan_forward(
    x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, goes_on: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Contiguous arguments as for `selective_scan_reference`. Returns y and the states before every chunk, float32."""
    (batch, tokens, d_inner), d_state = x.shape, A.shape[1]
    y = torch.empty_like(x)
    chunk_states = torch.empty(chunk_states_shape(x, A), dtype=torch.float32, device=x.device)
    _forward_kernel[(triton.cdiv(d_inner, BLOCK), batch)](
        x, dt, A, B, C, goes_on, y, chunk_states, tokens,
        d_inner=d_inner, d_state=d_state, N=triton.next_power_of_2(d_state), BLOCK=BLOCK,
        CHUNK=_chunk_size(d_state), num_warps=1,
    )  # fmt: skip
    return y, chunk_states


def scan_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    goes_on: torch.Tensor,
    chunk_states: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, dt, A, B, C for dy, the gradient of y; the arguments are those of the forward pass."""
    (batch, tokens, d_inner), d_state = x.shape, A.shape[1]
    blocks = triton.cdiv(d_inner, BLOCK)
    dx, ddt = torch.empty_like(x), torch.empty_like(dt)
    dA = torch.empty((batch, d_inner, d_state), dtype=torch.float32, device=x.device)
    dB = torch.empty((blocks, batch, tokens, d_state), dtype=torch.float32, device=x.device)
    dC = torch.empty_like(dB)
    _backward_kernel[(blocks, batch)](
        dy, x, dt, A, B, C, goes_on, chunk_states, dx, ddt, dA, dB, dC, tokens, batch,
        d_inner=d_inner, d_state=d_state, N=triton.next_power_of_2(d_state), BLOCK=BLOCK,
        CHUNK=_chunk_size(d_state), num_warps=1,
    )  # fmt: skip
    return dx, ddt, dA.sum(0), dB.sum(0).to(B.dtype), dC.sum(0).to(C.dtype)
