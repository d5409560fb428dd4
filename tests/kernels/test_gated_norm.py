import pytest
import torch
from scan_inputs import DEVICE, TOLERANCES, in_float64, relative_error

from vllm_longmamba.kernels import gated_norm, gated_norm_reference


def norm_inputs(tokens: int, channels: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """x and gate are parts of longer rows."""
    generator = torch.Generator().manual_seed(tokens + channels)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)

    x, gate = normal(tokens, channels + 9)[:, 3 : 3 + channels], normal(tokens, channels + 5)[:, :channels]
    return {"x": x, "gate": gate, "weight": normal(channels)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("tokens", "channels"), [(1, 8), (3, 70), (2, 513), (5, 2048)])
def test_gated_norm(tokens: int, channels: int, dtype: torch.dtype):
    inputs = norm_inputs(tokens, channels, dtype)
    rows = torch.full((tokens, channels + 7), float("nan"), dtype=dtype, device=DEVICE)
    out = gated_norm(**inputs, eps=1e-3, out=rows[:, 2:-5])
    expected = gated_norm_reference(**in_float64(inputs), eps=1e-3)
    assert relative_error(out, expected) < TOLERANCES[dtype]
    assert rows[:, :2].isnan().all()
    assert rows[:, -5:].isnan().all()


def test_gated_norm_in_place():
    inputs = norm_inputs(3, 70)
    expected = gated_norm_reference(**in_float64(inputs))
    assert gated_norm(**inputs, out=inputs["x"]) is inputs["x"]
    assert relative_error(inputs["x"], expected) < TOLERANCES[torch.float32]


def test_gated_norm_of_nothing():
    assert gated_norm(**norm_inputs(0, 8)).shape == (0, 8)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.zeros(8)}, r"x must be \(tokens, channels\)"),
        ({"gate": torch.zeros(2, 7)}, r"gate must have shape \(3, 8\)"),
        ({"weight": torch.zeros(16)[::2]}, "weight must be contiguous"),
        ({"out": torch.zeros(3, 8, dtype=torch.float64)}, "out must be torch.float32"),
    ],
)
def test_gated_norm_refuses(changed: dict[str, torch.Tensor], message: str):
    changed = {name: tensor.to(DEVICE) for name, tensor in changed.items()}
    with pytest.raises(ValueError, match=message):
        gated_norm(**(norm_inputs(3, 8) | changed))
