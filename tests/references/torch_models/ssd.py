"""Mamba-2's recurrence by matrix products over chunks of tokens (SSD, arXiv 2405.21060, section 6)."""

import torch
from torch.nn import functional


def ssd(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    state: torch.Tensor,
    chunk_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t`, `y_t = C_t h_t` in every head.

    All decays are exponentials of sums of dt A <= 0 between two tokens of a chunk, so none overflows at any length.
    These sums are differences of running sums in float64: in float32 a strong decay early in a chunk would blur all
    weaker ones behind it. A token of dt = 0 changes no state, not even by rounding within its chunk's sums.

    Args:
        x: (batch, tokens, nheads, headdim) float32.
        dt: (batch, tokens, nheads), after softplus.
        A: (nheads,), negative.
        B, C: (batch, tokens, ngroups, d_state); a group serves nheads / ngroups heads that lie side by side.
        state: (batch, nheads, headdim, d_state), h before the first token.
        chunk_size: tokens of a chunk; changes rounding and speed only.

    Returns:
        y as x, and the state after the last token.
    """
    tokens, headdim, ngroups = x.shape[1], x.shape[3], B.shape[2]
    size = min(chunk_size, tokens)
    padding = -tokens % size
    if padding:
        # dt = 0: padding neither decays nor feeds.
        x, B, C = (functional.pad(tensor, (0, 0, 0, 0, 0, padding)) for tensor in (x, B, C))
        dt = functional.pad(dt, (0, 0, 0, padding))
    x, dt, B, C = (torch.unflatten(tensor, 1, (-1, size)) for tensor in (x, dt, B, C))
    # (batch, chunks, nheads, size): sum of dt A from the chunk's begin up to and including each token
    sums = (dt.double() * A.double()).cumsum(2).transpose(2, 3)
    fed = (x * dt[..., None]).permute(0, 1, 3, 2, 4)  # (batch, chunks, nheads, size, headdim)
    B, C = B.transpose(2, 3), C.transpose(2, 3)  # (batch, chunks, ngroups, size, d_state)

    # (batch, chunks, nheads, size, size): decay from token j to token i, nothing from the future
    future = torch.ones(size, size, dtype=torch.bool, device=x.device).triu(1)
    decay = (sums[..., :, None] - sums[..., None, :]).float().masked_fill_(future, -torch.inf).exp_()
    mixing = torch.unflatten(decay, 2, (ngroups, -1)).mul_((C @ B.transpose(-1, -2))[:, :, :, None]).flatten(2, 3)
    y = mixing @ fed  # (batch, chunks, nheads, size, headdim)

    to_end = (sums[..., -1:] - sums).exp().float()[..., None]
    by_group = torch.unflatten((fed * to_end).transpose(-1, -2), 2, (ngroups, -1)).flatten(3, 4)
    gains = torch.unflatten(by_group @ B, 3, (-1, headdim)).flatten(2, 3)  # (batch, chunks, nheads, headdim, d_state)
    starts, state = _chain(gains, sums[..., -1].exp().float()[..., None, None], state)

    by_group = torch.unflatten(starts, 2, (ngroups, -1)).flatten(3, 4).transpose(-1, -2)
    carried = torch.unflatten(
        C @ by_group, -1, (-1, headdim)
    )  # (batch, chunks, ngroups, size, heads of a group, headdim)
    y += carried.transpose(3, 4).flatten(2, 3) * sums.exp().float()[..., None]
    return y.permute(0, 1, 3, 2, 4).flatten(1, 2)[:, :tokens], state


def _chain(gains: torch.Tensor, decays: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The states before each chunk, and the last one.

    Args:
        gains: (batch, chunks, nheads, headdim, d_state), what each chunk adds to the state by its end; overwritten.
        decays: (batch, chunks, nheads, 1, 1), of a state over a whole chunk.
        state: (batch, nheads, headdim, d_state), before the first chunk.
    """
    for chunk in range(gains.shape[1]):
        after = torch.addcmul(gains[:, chunk], decays[:, chunk], state)
        gains[:, chunk] = state
        state = after
    return gains, state
