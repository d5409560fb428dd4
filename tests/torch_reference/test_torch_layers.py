"""The parts of a layer: convolution, norms, softplus and its inverse, and Mamba-2's recurrence."""

import pytest
import torch
from torch.nn import functional
from torch_models.layers import (
    causal_conv1d,
    gated_rms_norm,
    inverse_softplus,
    rms_norm,
    softplus,
)
from torch_models.ssd import ssd

from vllm_longmamba.kernels.reference import ssd_reference

ATOL = 2e-5


def test_causal_conv1d_in_two_parts() -> None:
    x, weight, bias = torch.randn(2, 11, 5), torch.randn(5, 4), torch.randn(5)
    padded = functional.pad(x.transpose(1, 2), (3, 0))
    expected = functional.silu(functional.conv1d(padded, weight[:, None], bias, groups=5)).transpose(1, 2)
    history = torch.zeros(2, 3, 5)
    parts = []
    for part in (x[:, :1], x[:, 1:3], x[:, 3:]):
        y, history = causal_conv1d(part, weight, bias, history)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=0, atol=ATOL)
    torch.testing.assert_close(history, x[:, -3:], rtol=0, atol=0)


def test_norms() -> None:
    x, gate, weight = torch.randn(3, 6), torch.randn(3, 6), torch.randn(6)
    by_hand = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    torch.testing.assert_close(rms_norm(x, weight, 1e-3), by_hand * weight)
    torch.testing.assert_close(rms_norm(x, None, 1e-3), by_hand)
    gated = x * functional.silu(gate)
    halves = [half / (half.square().mean(-1, keepdim=True) + 1e-3).sqrt() for half in gated.chunk(2, dim=-1)]
    torch.testing.assert_close(gated_rms_norm(x, gate, weight, 1e-3, 2), torch.cat(halves, dim=-1) * weight)


def test_inverse_softplus() -> None:
    dt = torch.tensor([0.0, 1e-30, 1e-6, 0.3, 1.0, 19.0, 25.0, 1e4])
    raw = inverse_softplus(dt)
    assert raw[0] == -torch.inf
    torch.testing.assert_close(softplus(raw), dt, rtol=2e-6, atol=0)
    assert softplus(raw)[0] == 0.0


@pytest.mark.parametrize(
    ("tokens", "nheads", "ngroups", "chunk_size"),
    [(1, 4, 1, 32), (31, 4, 2, 32), (32, 4, 4, 32), (100, 6, 3, 32), (75, 2, 1, 1), (10, 2, 1, 256)],
)
def test_ssd(tokens: int, nheads: int, ngroups: int, chunk_size: int) -> None:
    generator = torch.Generator().manual_seed(tokens)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    # (batch, tokens, ...); dt from 0 to strong, one token in three at 0 in every head
    x, raw_dt = normal(2, tokens, nheads, 5), 3 * normal(2, tokens, nheads)
    raw_dt[:, ::3] = -torch.inf
    A = -torch.linspace(1e-3, 20.0, nheads, dtype=torch.float64)
    B, C, state = normal(2, tokens, ngroups, 7), normal(2, tokens, ngroups, 7), normal(2, nheads, 5, 7)
    # The reference's slot 0 is for padding.
    expected_state = torch.cat([state.new_zeros(1, nheads, 5, 7), state])
    expected = ssd_reference(
        *(tensor.flatten(0, 1) for tensor in (x, raw_dt)),
        A,
        *(tensor.flatten(0, 1) for tensor in (B, C)),
        torch.zeros(nheads),
        torch.zeros(nheads),
        expected_state,
        torch.tensor([0, tokens, 2 * tokens]),
        torch.tensor([1, 2]),
        torch.tensor([True, True]),
    ).unflatten(0, (2, tokens))
    inputs = [tensor.float() for tensor in (x, softplus(raw_dt), A, B, C, state)]
    y, last = ssd(*inputs, chunk_size)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=ATOL)
    torch.testing.assert_close(last.double(), expected_state[1:], rtol=1e-5, atol=ATOL)


def test_ssd_leaves_the_state_alone_where_dt_is_0() -> None:
    state = torch.randn(1, 2, 3, 4)
    x, B, C = torch.randn(1, 100, 2, 3), torch.randn(1, 100, 1, 4), torch.randn(1, 100, 1, 4)
    y, last = ssd(x, torch.zeros(1, 100, 2), -torch.ones(2), B, C, state, 32)
    assert torch.equal(last, state)
    torch.testing.assert_close(y, torch.einsum("bhpn,btgn->bthp", state, C), rtol=1e-6, atol=1e-6)


def test_ssd_over_64k_tokens_with_strong_and_weak_decay() -> None:
    """A constant input, for which h is a geometric series. The strong decay comes first, and must blur nothing."""
    tokens = 65536
    dt = torch.full((1, tokens, 2), 1e-4)
    dt[:, : tokens // 2] = 100.0
    A = torch.tensor([-1.0, -16.0])
    ones = torch.ones(1, tokens, 1, 1)
    y, last = ssd(ones.expand(-1, -1, 2, -1), dt, A, ones, ones, torch.zeros(1, 2, 1, 1), 32)
    rate, steps = A.double() * float(dt[0, -1, 0]), tokens // 2
    expected = 100.0 * (rate * steps).exp() + float(dt[0, -1, 0]) * (1 - (rate * steps).exp()) / (1 - rate.exp())
    torch.testing.assert_close(last[0, :, 0, 0].double(), expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(y[0, -1, :, 0], last[0, :, 0, 0])
    assert torch.isfinite(y).all()
