"""Tests of vllm_longmamba/checkpoint/loaded_weights.py, with modules that look like vLLM's."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from vllm_longmamba.checkpoint.loaded_weights import complete_weights


class UnquantizedLinearMethod:
    """Known by its name, as vLLM's are."""


class Fp8LinearMethod:
    """Of a quantized layer."""


class Layer(nn.Module):
    def __init__(self, method: object | None = None, **parameters: torch.Tensor) -> None:
        super().__init__()
        self.quant_method = method
        for name, tensor in parameters.items():
            self.register_parameter(name, nn.Parameter(tensor))


class Head(Layer):
    def tie_weights(self, embedding: Layer) -> "Head":
        self.weight = embedding.weight
        return self


class Model(nn.Module):
    """An embedding, a layer that appears twice, one that is quantized, and a head."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.config = SimpleNamespace(tie_word_embeddings=tied)
        self.model = nn.Module()
        self.model.embed_tokens = Layer(UnquantizedLinearMethod(), weight=torch.ones(4, 2))
        shared = Layer(UnquantizedLinearMethod(), weight=torch.ones(2, 2), nothing=torch.ones(0))
        quantized = Layer(Fp8LinearMethod(), weight=torch.ones(2, 2), scale=torch.ones(1))
        self.model.layers = nn.ModuleList([Layer(A=torch.ones(2)), shared, shared, quantized])
        self.lm_head: Any = Head(UnquantizedLinearMethod(), weight=torch.zeros(4, 2))


EMBEDDING, A, SHARED, HEAD = "model.embed_tokens.weight", "model.layers.0.A", "model.layers.2.weight", "lm_head.weight"


def test_complete_weights_of_a_whole_checkpoint() -> None:
    for tied in (False, True):
        model = Model(tied)
        complete_weights(model, {EMBEDDING, A, SHARED, HEAD})
        assert model.lm_head.weight is not model.model.embed_tokens.weight, "a head of the checkpoint stays"


def test_complete_weights_ties_the_head_that_vllm_left_empty() -> None:
    model = Model(tied=True)
    complete_weights(model, {EMBEDDING, A, SHARED})
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_complete_weights_of_a_tied_head() -> None:
    model = Model(tied=True)
    model.lm_head.tie_weights(model.model.embed_tokens)
    complete_weights(model, {EMBEDDING, A, SHARED})


@pytest.mark.parametrize(
    ("tied", "missing", "named"),
    [
        (False, {HEAD}, "lm_head.weight"),
        (True, {HEAD, EMBEDDING}, "model.embed_tokens.weight, lm_head.weight"),
        (True, {A}, "model.layers.0.A"),
        (True, {SHARED}, "model.layers.1.weight"),
    ],
    ids=["head", "head-and-embedding", "mixer", "shared"],
)
def test_complete_weights_refuses(tied: bool, missing: set[str], named: str) -> None:
    with pytest.raises(ValueError, match=f"every weight of the model, but has none for {named}; check that all its"):
        complete_weights(Model(tied), {EMBEDDING, A, SHARED, HEAD} - missing)


def test_complete_weights_names_ten() -> None:
    model = Model(tied=True)
    model.model.layers.extend([Layer(D=torch.ones(1)) for _ in range(11)])
    with pytest.raises(ValueError, match=r"layers\.13\.D and 1 more; check"):
        complete_weights(model, {EMBEDDING, A, SHARED})
