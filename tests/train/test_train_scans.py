"""The differentiable recurrences of examples/train, against a loop over tokens in float64."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from train.selective_scan import IS_INTERPRETED, selective_scan, selective_scan_reference
from train.ssd import CHUNK_SIZE, chunked_ssd, mamba_chunk_scan_combined, ssd

# batch, tokens, d_inner, d_state, tokens of a sequence
SCAN_SHAPES = {
    "odd": (2, 5, 33, 3, 5),
    "one token": (1, 1, 3, 16, 1),
    "whole chunks": (1, 8, 32, 16, 8),
    "many states": (1, 3, 2, 40, 3),
    "three sequences": (2, 8, 5, 4, 3),
}
# batch, tokens, nheads, headdim, d_state, tokens of a sequence
SSD_SHAPES = {
    "odd": (2, 2 * CHUNK_SIZE + 19, 3, 5, 7, 1000),
    "one token": (1, 1, 2, 4, 8, 1),
    "whole chunks": (1, 3 * CHUNK_SIZE, 1, 1, 1, 1000),
    "one chunk": (2, 7, 2, 3, 4, 7),
    "sequences of a chunk": (1, 3 * CHUNK_SIZE, 2, 3, 4, CHUNK_SIZE),
    "sequences of two chunks": (1, 4 * CHUNK_SIZE + 5, 2, 3, 4, 2 * CHUNK_SIZE),
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


def sequences_of(tokens: int, length: int) -> torch.Tensor:
    """seq_idx of a row of sequences of one length, the last of which may be shorter."""
    return (torch.arange(tokens, device=DEVICE) // length).int()


def one_by_one(length: int, *inputs: torch.Tensor) -> torch.Tensor:
    """The Mamba-1 reference, sequence after sequence."""
    x, dt, A, B, C = inputs
    alone = [
        selective_scan_reference(*part[:2], A, *part[2:], torch.ones(length, device=DEVICE))
        for part in zip(*(values.split(length, 1) for values in (x, dt, B, C)), strict=True)
    ]
    return torch.cat(alone, 1)


@pytest.mark.parametrize("shape", SCAN_SHAPES.values(), ids=SCAN_SHAPES)
def test_selective_scan_and_gradients(shape: tuple[int, int, int, int, int]) -> None:
    *sizes, length = shape
    inputs = scan_inputs(*sizes)
    dy = random_dy(inputs[0])
    seq_idx = sequences_of(inputs[0].shape[1], length)
    expected = with_gradients(lambda *values: one_by_one(length, *values), inputs, dy)
    actual = with_gradients(lambda *values: selective_scan(*values, seq_idx), [values.float() for values in inputs], dy)
    for theirs, ours in zip(expected, actual, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=TOLERANCE, rtol=TOLERANCE)


def test_selective_scan_keeps_bfloat16() -> None:
    x, dt, A, B, C = (values.float() for values in scan_inputs(1, 5, 8, 4))
    rounded = [x.bfloat16(), dt, A, B.bfloat16(), C.bfloat16()]
    actual = with_gradients(lambda *values: selective_scan(*values, sequences_of(5, 5)), rounded, torch.ones_like(x))
    expected = with_gradients(
        lambda *values: one_by_one(5, *values), [values.double() for values in rounded], torch.ones_like(x)
    )
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
    with pytest.raises(ValueError, match=r"selective_scan: dt, A, B, C, seq_idx"):
        selective_scan(x, dt, A.T, B, C, sequences_of(5, 5))


def ssd_inputs(batch: int, tokens: int, nheads: int, headdim: int, d_state: int) -> list[torch.Tensor]:
    """As `scan_inputs`, with x (batch, tokens, nheads, headdim), dt (batch, tokens, nheads) and A (nheads,)."""
    x, dt, A, B, C = scan_inputs(batch, tokens, nheads, d_state)
    return [random_dy(x.new_empty(batch, tokens, nheads, headdim)).flip(1), dt, A[:, 0], B, C]


def by_channels(length: int, *inputs: torch.Tensor) -> torch.Tensor:
    """Every channel of a head as a Mamba-1 channel with the head's dt and A."""
    x, dt, A, B, C = inputs
    headdim, d_state = x.shape[3], B.shape[2]
    dt, A = dt.repeat_interleave(headdim, 2), A.repeat_interleave(headdim)[:, None].expand(-1, d_state)
    return one_by_one(length, x.flatten(2), dt, A, B, C).unflatten(2, (-1, headdim))


@pytest.mark.parametrize("shape", SSD_SHAPES.values(), ids=SSD_SHAPES)
def test_chunked_ssd_and_gradients(shape: tuple[int, int, int, int, int, int]) -> None:
    *sizes, length = shape
    inputs, seq_idx = ssd_inputs(*sizes), sequences_of(sizes[1], length)
    dy = random_dy(inputs[0])
    expected = with_gradients(lambda *values: by_channels(length, *values), inputs, dy)
    actual = with_gradients(lambda *values: chunked_ssd(*values, seq_idx), inputs, dy)
    for theirs, ours in zip(expected, actual, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)


def test_ssd_has_finite_gradients_where_decay_is_strong() -> None:
    """exp of a positive difference above the diagonal would overflow and turn gradients into NaN."""
    x, dt, A, B, C = ssd_inputs(1, CHUNK_SIZE + 16, 2, 1, 4)
    inputs, seq_idx = [x, 100 * dt, A, B, C], sequences_of(CHUNK_SIZE + 16, 1000)
    for values in with_gradients(lambda *v: ssd(*v, seq_idx), [v.float() for v in inputs], x):
        assert values.isfinite().all()


@pytest.mark.gpu
@pytest.mark.skipif(mamba_chunk_scan_combined is None, reason="mamba-ssm is not installed")
def test_kernels_of_mamba_ssm_agree() -> None:
    """As they are used in training: bfloat16, several sequences in a row."""
    inputs = [values.float() for values in ssd_inputs(2, 1024, 4, 64, 128)]
    for index in (0, 3, 4):
        inputs[index] = (0.1 * inputs[index]).bfloat16()
    seq_idx, dy = sequences_of(1024, 256), random_dy(inputs[0])
    expected = with_gradients(lambda *v: chunked_ssd(*v, seq_idx), [v.double() for v in inputs], dy)
    for theirs, ours in zip(expected, with_gradients(lambda *v: ssd(*v, seq_idx), inputs, dy), strict=True):
        error = (ours.double() - theirs).norm() / theirs.norm()
        assert error < 0.02
