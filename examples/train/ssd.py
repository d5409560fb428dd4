"""The Mamba-2 recurrence over whole sequences as matrix products (state-space duality, arXiv 2405.21060, section 6)."""

import torch
import torch.nn.functional as F  # noqa: N812

try:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
except ImportError:
    mamba_chunk_scan_combined = None
else:
    # an autograd function around autotuned kernels, which torch.compile leaves alone
    mamba_chunk_scan_combined = torch.compiler.disable(mamba_chunk_scan_combined)

CHUNK_SIZE = 64
PEER_CHUNK_SIZE = 256  # of mamba-ssm's kernels


def ssd(
    x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, seq_idx: torch.Tensor
) -> torch.Tensor:
    """y_t = C_t h_t with h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t, from an empty state; differentiable.

    Args:
        x: (batch, tokens, nheads, headdim); its dtype is that of the products, decays are taken in float32.
        dt: (batch, tokens, nheads) float32, after softplus.
        A: (nheads,) float32, negative.
        B, C: (batch, tokens, d_state), shared by all heads.
        seq_idx: (tokens,) int32, which sequence of its row a token is of, in rising order; the state is emptied between
            sequences. All but the last of a row have a multiple of CHUNK_SIZE tokens.

    Returns:
        (batch, tokens, nheads, headdim), dtype of x.
    """
    if x.is_cuda and mamba_chunk_scan_combined is not None:
        B, C, seq_idx = B[:, :, None].to(x.dtype), C[:, :, None].to(x.dtype), seq_idx.expand(len(x), -1).contiguous()
        y: torch.Tensor = mamba_chunk_scan_combined(x, dt, A, B, C, PEER_CHUNK_SIZE, seq_idx=seq_idx)
        return y
    return chunked_ssd(x, dt, A, B, C, seq_idx)


def chunked_ssd(
    x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, seq_idx: torch.Tensor
) -> torch.Tensor:
    """The same without mamba-ssm, in torch; arguments as for `ssd`."""
    tokens, nheads, headdim = x.shape[1:]
    padding = -tokens % CHUNK_SIZE
    if padding:
        x = F.pad(x, (0, 0, 0, 0, 0, padding))
        dt, B, C = (F.pad(values, (0, 0, 0, padding)) for values in (dt, B, C))
    chunks, dtype = (tokens + padding) // CHUNK_SIZE, x.dtype
    B = B.to(dtype).unflatten(1, (chunks, CHUNK_SIZE))  # (batch, chunks, CHUNK_SIZE, d_state)
    C = C.to(dtype).unflatten(1, (chunks, CHUNK_SIZE))
    dt = dt.unflatten(1, (chunks, CHUNK_SIZE))
    x = x.unflatten(1, (chunks, CHUNK_SIZE))

    log_decay = (dt * A).transpose(2, 3).cumsum(-1)  # (batch, chunks, nheads, CHUNK_SIZE), from the chunk's beginning
    xdt = x * dt[..., None].to(dtype)

    # Within a chunk: attention-like scores, the same for all heads but for their decay.
    scores = C @ B.transpose(2, 3)  # (batch, chunks, to, from)
    decay = _decay_between(log_decay).to(dtype)  # (batch, chunks, nheads, to, from)
    y = (scores[:, :, None] * decay) @ xdt.transpose(2, 3)  # (batch, chunks, nheads, to, headdim)

    # What every chunk adds to the state, all heads side by side: (batch, chunks, d_state, nheads * headdim).
    to_end = (log_decay[..., -1:] - log_decay).exp().to(dtype).transpose(2, 3)
    added = B.transpose(2, 3) @ (xdt * to_end[..., None]).flatten(3)

    # The state before every chunk: sums over the chunks before it of the same sequence.
    total = log_decay[..., -1].transpose(1, 2).cumsum(-1)  # (batch, nheads, chunks)
    passed_on = F.pad(_decay_between(total), (0, 0, 1, 0))[:, :, :-1]  # before chunk c there are chunks up to c - 1
    first = seq_idx[::CHUNK_SIZE]
    passed_on = (passed_on * (first[:, None] == first)).to(dtype)
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
