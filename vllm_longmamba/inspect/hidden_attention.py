"""A Mamba layer seen as attention: how much each token of a prompt counts for each later one.

An SSM channel computes y_i = sum_j alpha_ij x_j (j <= i) with alpha_ij = C_i . exp(A sum_{j<k<=i} dt_k) dt_j B_j ("The
Hidden Attention of Mamba Models", arXiv 2403.01590). All of it is computed in float64, on the device of the inputs.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerInputs:
    """What the SSM of one layer reads for one prompt.

    Attributes:
        dt: (tokens, channels), after softplus; 0 where the token is filtered.
        A: (channels, d_state) for Mamba-1, (channels, 1) for Mamba-2; negative.
        B: (tokens, groups, d_state); channel c reads group c * groups // channels. Mamba-1 has one group.
        C: like B.
    """

    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor

    @property
    def tokens(self) -> int:
        return self.dt.shape[0]

    @property
    def channels(self) -> int:
        return self.dt.shape[1]


def attention(inputs: LayerInputs, channel: int, queries: Tensor) -> Tensor:
    """Rows of the attention matrix of one channel (Mamba-1) or head (Mamba-2).

    Args:
        inputs: of the layer.
        channel: its index.
        queries: (queries,) int64, positions i, ascending.

    Returns:
        (queries, tokens) float64: alpha_ij, 0 for j > i.
    """
    group = channel * inputs.B.shape[1] // inputs.channels
    B, C = inputs.B[:, group].double(), inputs.C[queries, group].double()
    dt, A = inputs.dt[:, channel].double(), inputs.A[channel].double()
    passed = dt.cumsum(0)
    # (queries, tokens): the dt's of the tokens after j up to i. Positive where j > i, so masked before the exponential.
    between = passed[queries, None] - passed[None, :]
    causal = queries[:, None] >= torch.arange(inputs.tokens, device=dt.device)[None, :]
    between = between.masked_fill(~causal, math.inf)
    if A.shape[0] == 1:
        return (C @ B.T) * (A * between).exp() * dt
    alpha = torch.zeros_like(between)
    for n in range(A.shape[0]):
        alpha += torch.outer(C[:, n], B[:, n]) * (A[n] * between).exp()
    return alpha * dt


def receptive_field(inputs: LayerInputs, channel: int, bins: int) -> Tensor:
    """The attention matrix of one channel as a picture of so many bins a side; fewer where there are fewer tokens.

    Returns:
        (bins, bins) float64: |alpha_ij| for a token i of each row's part of the prompt (its last), averaged over the
        tokens j of each column's part; NaN in columns that begin after i.
    """
    bins = min(bins, inputs.tokens)
    ends = torch.arange(1, bins + 1, device=inputs.dt.device) * inputs.tokens // bins
    alpha = attention(inputs, channel, ends - 1).abs()
    sums = torch.nn.functional.pad(alpha.cumsum(1), (1, 0))
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    pooled = (sums[:, ends] - sums[:, starts]) / (ends - starts)
    return pooled.masked_fill(starts[None, :] >= ends[:, None], math.nan)


def mean_distance(inputs: LayerInputs, channels: list[int]) -> Tensor:
    """How far back the last token of the prompt looks, in tokens: DeciMamba's Mamba mean distance.

    sum_j (S - j) |alpha_Sj| / sum_j |alpha_Sj| for a prompt of S tokens (arXiv 2406.14528, Eq. 10), for each channel by
    itself.

    Returns:
        (channels,) float64; 0 where all weights are 0, as when every token of the prompt is filtered.
    """
    last = torch.tensor([inputs.tokens - 1], device=inputs.dt.device)
    distance = (inputs.tokens - 1 - torch.arange(inputs.tokens, device=inputs.dt.device)).double()
    weights = torch.cat([attention(inputs, channel, last) for channel in channels]).abs()
    total = weights.sum(1)
    return torch.where(total > 0, weights @ distance / total.clamp(min=torch.finfo(total.dtype).tiny), 0.0)
