import sys
from typing import Any

import pytest
import torch
from scan_inputs import DEVICE, TOLERANCES, conv_update_inputs, in_float64, relative_error

from vllm_longmamba.kernels import (
    causal_conv1d_update_reference,
    most_small_tokens,
    small_product,
    small_product_reference,
)

module = sys.modules["vllm_longmamba.kernels.small_product"]


def product_inputs(
    tokens: int, features: int, inputs: int, dtype: torch.dtype = torch.float32, has_norm: bool = False
) -> dict[str, torch.Tensor | None]:
    """x and gate are parts of longer rows."""
    generator = torch.Generator().manual_seed(tokens + features + inputs)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)

    return {
        "x": normal(tokens, inputs + 9)[:, 3 : 3 + inputs],
        "weight": normal(features, inputs),
        "gate": normal(tokens, inputs + 5)[:, :inputs] if has_norm else None,
        "norm_weight": normal(inputs) if has_norm else None,
    }


def check(inputs: dict[str, torch.Tensor | None], dtype: torch.dtype = torch.float32) -> None:
    expected = small_product_reference(**in_float64(inputs))
    rows = torch.full((len(expected), expected.shape[1] + 7), float("nan"), dtype=dtype, device=DEVICE)
    out = small_product(**inputs, out=rows[:, 2:-5])
    assert relative_error(out, expected) < TOLERANCES[dtype]
    assert rows[:, :2].isnan().all()
    assert rows[:, -5:].isnan().all()


@pytest.mark.parametrize("has_norm", [False, True], ids=["alone", "norm"])
@pytest.mark.parametrize(("features", "inputs"), [(5, 40), (130, 1024), (66, 1300), (4100, 257)])
@pytest.mark.parametrize("tokens", [1, 3])
def test_small_product(tokens: int, features: int, inputs: int, has_norm: bool):
    check(product_inputs(tokens, features, inputs, has_norm=has_norm))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_small_product_half_precision(dtype: torch.dtype):
    check(product_inputs(2, 70, 600, dtype, has_norm=True), dtype)


def convolution(tokens: int, channels: int, width: int, *given: Any, **options: Any) -> dict[str, torch.Tensor | None]:
    """Of `conv_update_inputs`, without its input."""
    inputs = conv_update_inputs(tokens, channels, width, *given, **options)
    names = {"weight": "conv_weight", "bias": "conv_bias", "conv_state": "conv_state", "state_indices": "state_indices"}
    return {name: inputs[own] for own, name in names.items()}


def check_convolved(
    inputs: dict[str, torch.Tensor | None], conv: dict[str, torch.Tensor | None], silu: bool = True
) -> torch.Tensor:
    """Returns the state before."""
    before, own = conv["conv_state"].clone(), in_float64(conv)
    channels, tolerance = len(conv["conv_weight"]), TOLERANCES[inputs["x"].dtype]
    product = small_product_reference(**in_float64(inputs)).to(inputs["x"].dtype)
    names = ("conv_weight", "conv_bias", "conv_state", "state_indices")
    expected = causal_conv1d_update_reference(product[:, :channels].double(), *(own[name] for name in names), silu)
    out = small_product(**inputs, **conv, silu=silu)
    is_row = conv["state_indices"] != 0
    assert relative_error(out[is_row, :channels], expected[is_row]) < tolerance
    assert relative_error(out[:, channels:], product[:, channels:].double()) < tolerance
    assert relative_error(conv["conv_state"], own["conv_state"]) < tolerance
    return before


@pytest.mark.parametrize(("channels", "width", "has_bias"), [(69, 4, True), (33, 3, False), (24, 2, True)])
@pytest.mark.parametrize("tokens", [1, 3])
def test_small_product_and_convolution(tokens: int, channels: int, width: int, has_bias: bool):
    check_convolved(product_inputs(tokens, 70, 40), convolution(tokens, channels, width, has_bias=has_bias))


def test_small_product_and_convolution_without_activation():
    check_convolved(product_inputs(2, 70, 40), convolution(2, 30, 4), silu=False)


def test_small_product_and_convolution_in_half_precision():
    dtype = torch.float16
    check_convolved(product_inputs(2, 70, 600, dtype), convolution(2, 30, 4, dtype))


def test_small_product_and_convolution_leave_the_null_block_alone():
    conv = convolution(3, 30, 4)
    conv["state_indices"][1] = 0
    before = check_convolved(product_inputs(3, 70, 40), conv)
    # the null block, the slot that row 1 had, and one that nobody named
    for slot in (0, 2, 4):
        torch.testing.assert_close(conv["conv_state"][slot], before[slot], rtol=0, atol=0)


def test_small_product_allocates_its_result():
    inputs = product_inputs(2, 6, 8)
    assert relative_error(small_product(**inputs), small_product_reference(**in_float64(inputs))) < 2e-6


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.zeros(5, 8)}, "1 to 4 tokens"),
        ({"x": torch.zeros(0, 8)}, "1 to 4 tokens"),
        ({"x": torch.zeros(2, 9)}, r"x must have shape \(2, 8\)"),
        ({"weight": torch.zeros(8, 6).t()}, "weight must be contiguous"),
        ({"gate": torch.zeros(2, 8)}, "belong together"),
        ({"gate": torch.zeros(2, 8), "norm_weight": torch.zeros(7)}, r"norm_weight must have shape \(8,\)"),
        ({"out": torch.zeros(2, 6, dtype=torch.float64)}, "out must be torch.float32"),
        (convolution(2, 7, 4), "must have shape"),
        (convolution(2, 4, 4) | {"conv_state": None}, "belong together"),
        (convolution(2, 4, 4) | {"state_indices": None}, "belong together"),
        (convolution(2, 4, 4) | {"conv_bias": torch.zeros(5)}, r"bias must have shape \(4,\)"),
    ],
)
def test_small_product_refuses(changed: dict[str, torch.Tensor | None], message: str):
    arguments = product_inputs(2, 6, 8) | {
        name: None if tensor is None else tensor.to(DEVICE) for name, tensor in changed.items()
    }
    with pytest.raises(ValueError, match=message):
        small_product(**arguments)


@pytest.mark.parametrize(
    ("tokens", "features", "inputs", "preferred"),
    [
        (0, 160, 4096, False),
        (1, 8512, 2048, True),
        (2, 8512, 2048, False),
        (2, 2048, 4096, True),
        (3, 2048, 4096, False),
        (4, 160, 4096, True),
        (5, 160, 4096, False),
        (1, 16384, 4096, False),
    ],
)
def test_few_tokens_prefer_it(
    tokens: int, features: int, inputs: int, preferred: bool, monkeypatch: pytest.MonkeyPatch
):
    weight = torch.empty(features, inputs, device="meta")
    for supports in (True, False):
        monkeypatch.setattr(module, "supports_dependent_launch", lambda _, supports=supports: supports)
        assert (0 < tokens <= most_small_tokens(weight)) == (preferred and supports)
