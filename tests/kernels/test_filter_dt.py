import pytest
import torch
from scan_inputs import DEVICE

from vllm_longmamba.kernels import filter_dt_, filter_dt_reference


def filter_inputs(tokens: int, channels: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """A dt that is a slice of a wider projection, and three rows of thresholds."""
    generator = torch.Generator().manual_seed(tokens + channels)
    projection = torch.randn(tokens, channels + 11, generator=generator).to(dtype).to(DEVICE)
    dt_threshold = torch.rand(3, channels, generator=generator) * 2.0
    dt_threshold[0] = -1.0
    dt_threshold[:, ::4] = -1.0
    token_rows = torch.randint(0, 3, (tokens,), generator=generator, dtype=torch.int32)
    return projection, torch.randn(channels).to(DEVICE), dt_threshold.to(DEVICE), token_rows.to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    ("tokens", "channels"),
    [(1, 1), (1, 80), (13, 5), (17, 131), (0, 4)],
    ids=["one-number", "one-token", "odd", "two-blocks", "empty"],
)
def test_filter_dt_(tokens: int, channels: int, dtype: torch.dtype):
    projection, dt_bias, dt_threshold, token_rows = filter_inputs(tokens, channels, dtype)
    expected = projection.cpu()
    reference = (tensor.cpu() for tensor in (dt_bias, dt_threshold, token_rows))
    filter_dt_reference(expected[:, 7 : 7 + channels], *reference)
    filter_dt_(projection[:, 7 : 7 + channels], dt_bias, dt_threshold, token_rows)
    torch.testing.assert_close(projection.cpu(), expected, rtol=0, atol=0)


def test_filter_dt_of_a_dt_equal_to_the_threshold():
    """It is filtered; above 20 softplus is exact."""
    dt = torch.full((1, 3), 30.0, device=DEVICE)
    dt_threshold = torch.tensor([[-1.0, -1.0, -1.0], [30.0, 29.5, 30.5]], device=DEVICE)
    filter_dt_(dt, torch.zeros(3, device=DEVICE), dt_threshold, torch.ones(1, dtype=torch.int32, device=DEVICE))
    assert dt.tolist() == [[float("-inf"), 30.0, float("-inf")]]


def test_filter_dt_row_0_keeps_everything():
    projection, dt_bias, dt_threshold, token_rows = filter_inputs(9, 6, torch.float32)
    before = projection.clone()
    filter_dt_(projection[:, :6], dt_bias, dt_threshold, torch.zeros_like(token_rows))
    torch.testing.assert_close(projection, before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("position", "wrong", "message"),
    [
        (0, torch.zeros(8, 4).T, "stride 1"),
        (0, torch.zeros(4), "dt must have shape"),
        (0, torch.zeros(4, 8, dtype=torch.float64), "dt must be"),
        (1, torch.zeros(7), "dt_bias must have shape"),
        (2, torch.zeros(3, 8, dtype=torch.bfloat16), "dt_threshold must be"),
        (2, torch.zeros(8, 3).T, "dt_threshold must be contiguous"),
        (3, torch.zeros(4, dtype=torch.int64), "token_rows must be"),
        (3, torch.zeros(5, dtype=torch.int32), "token_rows must have shape"),
    ],
    ids=["dt-stride", "dt-shape", "dt-dtype", "bias", "threshold-dtype", "threshold-stride", "rows-dtype", "rows"],
)
def test_filter_dt_rejects(position: int, wrong: torch.Tensor, message: str):
    arguments = [torch.zeros(4, 8), torch.zeros(8), torch.zeros(3, 8), torch.zeros(4, dtype=torch.int32)]
    arguments[position] = wrong
    with pytest.raises(ValueError, match=message):
        filter_dt_(*arguments)
