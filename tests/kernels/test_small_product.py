import sys

import pytest
import torch
from scan_inputs import DEVICE, TOLERANCES, in_float64, relative_error

from vllm_longmamba.kernels import prefers_small_product, small_product, small_product_reference

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
    ],
)
def test_small_product_refuses(changed: dict[str, torch.Tensor], message: str):
    arguments = product_inputs(2, 6, 8) | {name: tensor.to(DEVICE) for name, tensor in changed.items()}
    with pytest.raises(ValueError, match=message):
        small_product(**arguments)


@pytest.mark.parametrize(
    ("tokens", "features", "preferred"),
    [
        (0, 160, False),
        (1, 16384, True),
        (2, 16384, False),
        (2, 2048, True),
        (3, 2048, False),
        (4, 160, True),
        (5, 160, False),
    ],
)
def test_few_tokens_prefer_it(tokens: int, features: int, preferred: bool, monkeypatch: pytest.MonkeyPatch):
    device = torch.device("cuda")
    for supports in (True, False):
        monkeypatch.setattr(module, "supports_dependent_launch", lambda _, supports=supports: supports)
        assert prefers_small_product(tokens, features, device) == (preferred and supports)
