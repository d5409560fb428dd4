"""Which weights this project's kernel may read, and that every way through `project` gives the same."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear, UnquantizedLinearMethod

from vllm_longmamba.kernels import small_product_reference
from vllm_longmamba.layers import projections
from vllm_longmamba.layers.projections import GatedNorm, plain_weight, project


def linear(kind: type = RowParallelLinear, **attributes: Any) -> Any:
    """One of vLLM's layers without its set-up, which needs a process group."""
    layer = object.__new__(kind)
    torch.nn.Module.__init__(layer)
    given = {"bias": None, "tp_size": 1, "weight": SimpleNamespace(is_cuda=True)} | attributes
    given.setdefault("quant_method", object.__new__(UnquantizedLinearMethod))
    for name, value in given.items():
        setattr(layer, name, value)
    return layer


class WithAdapter(RowParallelLinear):
    """As vLLM wraps a layer for LoRA."""


@pytest.mark.parametrize(
    ("layer", "is_plain"),
    [
        (linear(), True),
        (linear(ColumnParallelLinear, tp_size=2), True),
        (linear(tp_size=2), False),
        (linear(WithAdapter), False),
        (linear(quant_method=object()), False),
        (linear(bias=torch.zeros(1)), False),
        (linear(weight=torch.zeros(1, 1)), False),
        (None, False),
    ],
    ids=["row", "column", "ranks", "adapter", "quantized", "bias", "cpu", "none"],
)
def test_plain_weight(layer: Any, is_plain: bool) -> None:
    assert (plain_weight(layer) is not None) == is_plain


class Linear(torch.nn.Module):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return x @ self.weight.t(), None


@pytest.mark.parametrize("has_out", [False, True])
@pytest.mark.parametrize(("is_plain", "is_small"), [(False, False), (True, False), (True, True)])
def test_all_ways_give_the_same(is_plain: bool, is_small: bool, has_out: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projections, "plain_weight", lambda layer: layer.weight if is_plain else None)
    monkeypatch.setattr(projections, "most_small_tokens", lambda _: 2 if is_small else 0)
    x, weight = torch.randn(2, 6), torch.randn(5, 6)
    out = torch.empty(2, 5) if has_out else None
    projected = project(Linear(weight), x, out)
    torch.testing.assert_close(projected, x @ weight.t())
    assert out is None or projected.data_ptr() == out.data_ptr()


def test_with_a_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projections, "plain_weight", lambda layer: layer.weight)
    monkeypatch.setattr(projections, "most_small_tokens", lambda _: 1)
    x, weight, norm = torch.randn(1, 6), torch.randn(5, 6), GatedNorm(torch.randn(1, 6), torch.randn(6), 1e-3)
    expected = small_product_reference(x, weight, *norm)
    torch.testing.assert_close(project(Linear(weight), x, norm=norm), expected)
