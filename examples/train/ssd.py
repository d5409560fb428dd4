"""The Mamba-2 recurrence over whole sequences as matrix products (state-space duality, arXiv 2405.21060, section 6)."""

import torch
import torch.nn.functional as F  # noqa: N812


def ssd(
    x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, chunk_size: int = 64
) -> torch.Tensor:
    """y_t = C_t h_t with h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t, from an empty state; differentiable.

    Args:
        x: (batch, tokens, nheads, headdim); its dtype is that of the products, decays are taken in float32.
        dt: (batch, tokens, nheads) float32, after softplus.
        A: (nheads,) float32, negative.
        B, C: (batch, tokens, d_state), shared by all heads.
        chunk_size: tokens a chunk. Any number of tokens is allowed; the last chunk is padded.

    Returns:
        (batch, tokens, nheads, headdim), dtype of x.
    """
    tokens, nheads, headdim = x.shape[1:]
    padding = -tokens % chunk_size
    if padding:
        x = F.pad(x, (0, 0, 0, 0, 0, padding))
        dt, B, C = (F.pad(values, (0, 0, 0, padding)) for values in (dt, B, C))
    chunks, dtype = (tokens + padding) // chunk_size, x.dtype
    B = B.to(dtype).unflatten(1, (chunks, chunk_size))  # (batch, chunks, chunk_size, d_state)
    C = C.to(dtype).unflatten(1, (chunks, chunk_size))
    dt = dt.unflatten(1, (chunks, chunk_size))
    x = x.unflatten(1, (chunks, chunk_size))

    log_decay = (dt * A).transpose(2, 3).cumsum(-1)  # (batch, chunks, nheads, chunk_size), from the chunk's beginning
    xdt = x * dt[..., None].to(dtype)

    # Within a chunk: attention-like scores, the same for all heads but for their decay.
    scores = C @ B.transpose(2, 3)  # (batch, chunks, to, from)
    decay = _decay_between(log_decay).to(dtype)  # (batch, chunks, nheads, to, from)
    y = (scores[:, :, None] * decay) @ xdt.transpose(2, 3)  # (batch, chunks, nheads, to, headdim)

    # What every chunk adds to the state, all heads side by side: (batch, chunks, d_state, nheads * headdim).
    to_end = (log_decay[..., -1:] - log_decay).exp().to(dtype).transpose(2, 3)
    added = B.transpose(2, 3) @ (xdt * to_end[..., None]).flatten(3)

    # The state before every chunk: sums over the chunks before it.
    total = log_decay[..., -1].transpose(1, 2).cumsum(-1)  # (batch, nheads, chunks)
    passed_on = _decay_between(total)
    passed_on = F.pad(passed_on, (0, 0, 1, 0))[:, :, :-1].to(dtype)  # state before chunk c holds chunks up to c - 1
    added = added.unflatten(3, (nheads, headdim))
    before = torch.einsum("bhcz,bznhp->bcnhp", passed_on, added)

    from_before = (C @ before.flatten(3)).unflatten(3, (nheads, headdim))  # (batch, chunks, to, nheads, headdim)
    y = y.transpose(2, 3) + from_before * log_decay.exp().to(dtype).transpose(2, 3)[..., None]
    return y.flatten(1, 2)[:, :tokens]


def _decay_between(log_decay: torch.Tensor) -> torch.Tensor:
    """exp of the differences (..., to, from) of cumulative logarithms (..., n); 0 where from lies behind to."""
    difference = log_decay[..., :, None] - log_decay[..., None, :]
    n = log_decay.shape[-1]
    is_past = torch.ones(n, n, dtype=torch.bool, device=log_decay.device).tril()
    # -inf before the exponential: an overflow above the diagonal would make gradients NaN.
    return difference.masked_fill(~is_past, -torch.inf).exp()
