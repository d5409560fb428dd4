import pytest
import torch
from scan_inputs import TOLERANCES, conv_update_inputs, in_float64, relative_error

from vllm_longmamba.kernels import causal_conv1d_update, causal_conv1d_update_reference


def check(inputs: dict[str, torch.Tensor | None], dtype: torch.dtype = torch.float32, **options: bool) -> None:
    expected_inputs = in_float64(inputs)
    expected = causal_conv1d_update_reference(**expected_inputs, **options)
    out = causal_conv1d_update(**inputs, **options, out=torch.full_like(inputs["x"], float("nan")))
    assert not out.isnan().any()
    is_row = inputs["state_indices"] != 0
    assert relative_error(out[is_row], expected[is_row]) < TOLERANCES[dtype]
    assert relative_error(inputs["conv_state"], expected_inputs["conv_state"]) == 0


@pytest.mark.parametrize("width", [4, 3, 2], ids=["width=4", "width=3", "width=2"])
@pytest.mark.parametrize("channels", [5, 300], ids=["one-block", "blocks"])
@pytest.mark.parametrize("batch", [1, 5, 18, 130])
def test_causal_conv1d_update(batch: int, channels: int, width: int):
    check(conv_update_inputs(batch, channels, width))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_causal_conv1d_update_half_precision(dtype: torch.dtype):
    check(conv_update_inputs(5, dtype=dtype), dtype)


def test_causal_conv1d_update_without_bias_and_activation():
    check(conv_update_inputs(5, has_bias=False), silu=False)


def test_causal_conv1d_update_of_a_state_with_channels_first():
    check(conv_update_inputs(5, is_dim_first=True))


def test_causal_conv1d_update_goes_on_where_it_left_off():
    inputs = conv_update_inputs(3)
    check(inputs)
    check(inputs | {"x": -inputs["x"]})


def test_causal_conv1d_update_leaves_null_block_alone():
    inputs = conv_update_inputs(6)
    inputs["state_indices"][2] = 0
    before = inputs["conv_state"].clone()
    check(inputs)
    # the null block, the slot that row 2 had, and one that nobody named
    for slot in (0, 4, 7):
        torch.testing.assert_close(inputs["conv_state"][slot], before[slot], rtol=0, atol=0)


def test_causal_conv1d_update_of_an_empty_batch():
    assert causal_conv1d_update(**conv_update_inputs(0)).shape == (0, 20)


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("x", torch.zeros(20, 2).T, "stride 1"),
        ("weight", torch.zeros(20, 1), "weight"),
        ("weight", torch.zeros(4, 20).T, "weight must be contiguous"),
        ("bias", torch.zeros(5), "bias must have shape"),
        ("conv_state", torch.zeros(3, 20, 4), "conv_state must be"),
        ("state_indices", torch.zeros(2, dtype=torch.int64), "state_indices must be"),
        ("out", torch.zeros(2, 20, dtype=torch.bfloat16), "out must be"),
    ],
)
def test_causal_conv1d_update_rejects(name: str, wrong: torch.Tensor, message: str):
    inputs = {key: tensor.cpu() for key, tensor in conv_update_inputs(2).items()}
    with pytest.raises(ValueError, match=message):
        causal_conv1d_update(**(inputs | {name: wrong}))
