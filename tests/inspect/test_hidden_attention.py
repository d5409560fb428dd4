"""Hidden attention against the recurrence that it unrolls, token by token."""

import pytest
import torch

from vllm_longmamba.inspect.hidden_attention import LayerInputs, attention, mean_distance, receptive_field

SHAPES = pytest.mark.parametrize(
    ("channels", "d_state_of_A", "groups", "d_state"),
    [(5, 3, 1, 3), (6, 1, 2, 4)],
    ids=["mamba1", "mamba2-2-groups"],
)


def make_inputs(tokens: int, channels: int, d_state_of_A: int, groups: int, d_state: int) -> LayerInputs:
    generator = torch.Generator().manual_seed(tokens)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    dt = normal(tokens, channels).exp() / 10
    dt[torch.rand(tokens, channels, generator=generator) < 0.3] = 0.0
    A = -normal(channels, d_state_of_A).exp()
    return LayerInputs(dt, A, normal(tokens, groups, d_state), normal(tokens, groups, d_state))


def scan(inputs: LayerInputs, channel: int, x: torch.Tensor) -> torch.Tensor:
    """y of one channel for x (tokens,), by the recurrence."""
    group = channel // (inputs.dt.shape[1] // inputs.B.shape[1])
    A = inputs.A[channel].double()
    h = torch.zeros(inputs.B.shape[2], dtype=torch.float64)
    y = []
    for t in range(len(x)):
        dt = inputs.dt[t, channel].double()
        h = torch.exp(dt * A) * h + dt * inputs.B[t, group].double() * x[t]
        y.append(h @ inputs.C[t, group].double())
    return torch.stack(y)


@SHAPES
@pytest.mark.parametrize("tokens", [1, 37])
def test_attention(tokens: int, channels: int, d_state_of_A: int, groups: int, d_state: int) -> None:
    inputs = make_inputs(tokens, channels, d_state_of_A, groups, d_state)
    x = torch.randn(tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for channel in range(channels):
        alpha = attention(inputs, channel, torch.arange(tokens))
        torch.testing.assert_close(alpha @ x, scan(inputs, channel, x), rtol=1e-9, atol=1e-12)
        assert (alpha.triu(1) == 0).all()
        torch.testing.assert_close(attention(inputs, channel, torch.tensor([tokens - 1])), alpha[-1:])


def test_attention_of_a_long_prompt_stays_finite() -> None:
    inputs = make_inputs(2000, 2, 1, 1, 4)
    alpha = attention(LayerInputs(inputs.dt * 100, inputs.A, inputs.B, inputs.C), 0, torch.arange(2000))
    assert alpha.isfinite().all()


@pytest.mark.parametrize("tokens", [1, 5, 37])
def test_receptive_field(tokens: int) -> None:
    inputs = make_inputs(tokens, 4, 3, 1, 3)
    alpha = attention(inputs, 2, torch.arange(tokens)).abs()
    bins = min(8, tokens)
    picture = receptive_field(inputs, 2, 8)
    assert picture.shape == (bins, bins)
    edges = [part * tokens // bins for part in range(bins + 1)]
    for row in range(bins):
        for column in range(bins):
            if column > row:
                assert picture[row, column].isnan()
            else:
                part = alpha[edges[row + 1] - 1, edges[column] : edges[column + 1]]
                torch.testing.assert_close(picture[row, column], part.mean())


@SHAPES
def test_mean_distance(channels: int, d_state_of_A: int, groups: int, d_state: int) -> None:
    tokens = 23
    inputs = make_inputs(tokens, channels, d_state_of_A, groups, d_state)
    inputs.dt[:, 1] = 0.0
    measured = mean_distance(inputs, [0, 1, channels - 1])
    for position, channel in enumerate((0, 1, channels - 1)):
        weights = attention(inputs, channel, torch.arange(tokens))[-1].abs()
        expected = sum((tokens - 1 - j) * float(weights[j]) for j in range(tokens)) / max(float(weights.sum()), 1e-300)
        assert float(measured[position]) == pytest.approx(expected)
    assert measured[1] == 0.0
    assert 0 < measured[0] < tokens


def test_mean_distance_of_uniform_attention() -> None:
    ones = torch.ones(11, 1, 1)
    inputs = LayerInputs(torch.ones(11, 1), torch.full((1, 1), -1e-12), ones, ones)
    assert float(mean_distance(inputs, [0])[0]) == pytest.approx(5.0)
