"""The differentiable recurrences of examples/train, against a loop over tokens in float64."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from train.selective_scan import IS_INTERPRETED, selective_scan, selective_scan_reference
from train.ssd import ssd

# batch, tokens, d_inner, d_state
SCAN_SHAPES = {
    "odd": (2, 5, 33, 3),
    "one token": (1, 1, 3, 16),
    "whole chunks": (1, 8, 32, 16),
    "many states": (1, 3, 2, 40),
}
# batch, tokens, nheads, headdim, d_state, chunk_size
SSD_SHAPES = {
    "odd": (2, 19, 3, 5, 7, 4),
    "one token": (1, 1, 2, 4, 8, 16),
    "whole chunks": (1, 12, 1, 1, 1, 4),
    "one chunk": (2, 7, 2, 3, 4, 64),
}
# float32 in the kernels, float64 in the reference; values and gradients are of the order of 1 to 10
TOLERANCE = 2e-5
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def scan_inputs(batch: int, tokens: int, d_inner: int, d_state: int) -> list[torch.Tensor]:
    """x, dt, A, B, C in float64 on DEVICE; dt and A such that some states last and some do not."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    dt = torch.rand(batch, tokens, d_inner, generator=generator, dtype=torch.float64)
    A = -3 * torch.rand(d_inner, d_state, generator=generator, dtype=torch.float64)
    inputs = [normal(batch, tokens, d_inner), dt, A, normal(batch, tokens, d_state), normal(batch, tokens, d_state)]
    return [values.to(DEVICE) for values in inputs]


def random_dy(like: torch.Tensor) -> torch.Tensor:
    """A gradient of y."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.device)


def with_gradients(function, inputs: list[torch.Tensor], dy: torch.Tensor) -> list[torch.Tensor]:
    """The function's result and the gradients of all of its arguments."""
    inputs = [values.detach().requires_grad_() for values in inputs]
    y = function(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, dy.to(y.dtype))]


@pytest.mark.parametrize("shape", SCAN_SHAPES.values(), ids=SCAN_SHAPES)
def test_selective_scan_and_gradients(shape: tuple[int, int, int, int]) -> None:
    inputs = scan_inputs(*shape)
    dy = random_dy(inputs[0])
    expected = with_gradients(selective_scan_reference, inputs, dy)
    actual = with_gradients(selective_scan, [values.float() for values in inputs], dy)
    for theirs, ours in zip(expected, actual, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=TOLERANCE, rtol=TOLERANCE)


def test_selective_scan_keeps_bfloat16() -> None:
    x, dt, A, B, C = (values.float() for values in scan_inputs(1, 5, 8, 4))
    rounded = [x.bfloat16(), dt, A, B.bfloat16(), C.bfloat16()]
    actual = with_gradients(selective_scan, rounded, torch.ones_like(x))
    expected = with_gradients(selective_scan_reference, [values.double() for values in rounded], torch.ones_like(x))
    assert [values.dtype for values in actual[1:]] == [values.dtype for values in rounded]
    for theirs, ours in zip(expected, actual, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=0.1, rtol=0.02)


@pytest.mark.skipif(IS_INTERPRETED, reason="is what runs already")
def test_triton_kernels_in_interpreter() -> None:
    pytest.importorskip("triton")
    # Has to be set before triton is imported, and would slow down other tests.
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(Path(__file__)), "-k", "scan"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]


def test_selective_scan_refuses_wrong_shapes() -> None:
    x, dt, A, B, C = scan_inputs(1, 5, 8, 4)
    with pytest.raises(ValueError, match=r"selective_scan: dt, A, B, C"):
        selective_scan(x, dt, A.T, B, C)


@pytest.mark.parametrize("shape", SSD_SHAPES.values(), ids=SSD_SHAPES)
def test_ssd_and_gradients(shape: tuple[int, int, int, int, int, int]) -> None:
    batch, tokens, nheads, headdim, d_state, chunk_size = shape
    x, dt, A, B, C = scan_inputs(batch, tokens, nheads, d_state)
    A = A[:, 0]
    x = random_dy(x.new_empty(batch, tokens, nheads, headdim)).flip(1)
    dy = random_dy(x)

    def by_channels(
        x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor
    ) -> torch.Tensor:
        """Every channel of a head as a Mamba-1 channel with the head's dt and A."""
        dt, A = dt.repeat_interleave(headdim, 2), A.repeat_interleave(headdim)[:, None].expand(-1, d_state)
        return selective_scan_reference(x.flatten(2), dt, A, B, C).unflatten(2, (nheads, headdim))

    expected = with_gradients(by_channels, [x, dt, A, B, C], dy)
    actual = with_gradients(lambda *inputs: ssd(*inputs, chunk_size=chunk_size), [x, dt, A, B, C], dy)
    for theirs, ours in zip(expected, actual, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)


def test_ssd_has_finite_gradients_where_decay_is_strong() -> None:
    """exp of a positive difference above the diagonal would overflow and turn gradients into NaN."""
    x, dt, A, B, C = scan_inputs(1, 16, 2, 4)
    inputs = [x[..., None], 100 * dt, A[:, 0], B, C]
    for values in with_gradients(lambda *v: ssd(*v, chunk_size=8), [v.float() for v in inputs], x[..., None]):
        assert values.isfinite().all()
