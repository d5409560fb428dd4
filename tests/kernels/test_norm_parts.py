from typing import Any

import pytest
import torch
from scan_inputs import DEVICE, TOLERANCES, in_float64, relative_error

from vllm_longmamba.kernels import norm_parts_, norm_parts_reference


def norm_inputs(
    tokens: int, rank: int, d_state: int, dtype: torch.dtype, has_weights: bool = True
) -> tuple[torch.Tensor, dict[str, Any], dict[str, torch.Tensor]]:
    """Rows that x is a part of, arguments, and weights. B is larger than the rest: a norm of all would be another."""
    generator = torch.Generator().manual_seed(tokens + rank)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)

    rows = normal(tokens, rank + 2 * d_state + 9)
    rows[:, 3 + rank : 3 + rank + d_state] *= 8
    sizes = {"dt_weight": rank, "B_weight": d_state, "C_weight": d_state} if has_weights else {}
    return rows, {"rank": rank, "eps": 1e-3}, {name: normal(size) for name, size in sizes.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("has_weights", [False, True])
@pytest.mark.parametrize(("tokens", "rank", "d_state"), [(1, 4, 3), (3, 20, 16), (517, 8, 4)])
def test_norm_parts(tokens: int, rank: int, d_state: int, has_weights: bool, dtype: torch.dtype):
    rows, arguments, weights = norm_inputs(tokens, rank, d_state, dtype, has_weights)
    before, x = rows.clone(), rows[:, 3:-6]
    expected = norm_parts_reference(x.double(), **arguments, **in_float64(weights))
    assert norm_parts_(x, **arguments, **weights) is x
    for part, its_expected in zip(*(each.split([rank, d_state, d_state], 1) for each in (x, expected)), strict=True):
        assert relative_error(part, its_expected) < TOLERANCES[dtype]
    assert torch.equal(rows[:, :3], before[:, :3])
    assert torch.equal(rows[:, -6:], before[:, -6:])


def test_norm_parts_of_nothing():
    rows, arguments, weights = norm_inputs(0, 4, 4, torch.float32)
    assert norm_parts_(rows[:, 3:-6], **arguments, **weights).shape == (0, 12)


@pytest.mark.parametrize(
    ("x", "rank", "weights", "message"),
    [
        (torch.zeros(8), 4, {}, r"x must be \(tokens, rank \+ 2 \* d_state\)"),
        (torch.zeros(3, 9), 4, {}, "with rank 4"),
        (torch.zeros(3, 8), 8, {}, "with rank 8"),
        (torch.zeros(3, 8, dtype=torch.float64), 4, {}, "x must be torch.bfloat16"),
        (torch.zeros(3, 8), 4, {"dt_weight": 4}, "must be given together"),
        (torch.zeros(3, 8), 4, {"dt_weight": 4, "B_weight": 3, "C_weight": 2}, r"B_weight must have shape \(2,\)"),
    ],
)
def test_norm_parts_refuses(x: torch.Tensor, rank: int, weights: dict[str, int], message: str):
    given = {name: torch.zeros(size, device=DEVICE) for name, size in weights.items()}
    with pytest.raises(ValueError, match=message):
        norm_parts_(x.to(DEVICE), rank, **given)
