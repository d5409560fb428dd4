import pytest
import torch
from scan_inputs import DEVICE, IS_INTERPRETED, TOLERANCES, relative_error
from test_ssd import BF16, ssd_inputs

from vllm_longmamba.kernels import gated_norm_, gated_norm_reference, ssd, ssd_reference

EPS = 1e-5
FLOATS = [BF16, pytest.param(torch.float32, id="fp32")]


def gate_inputs(tokens: int, d_inner: int, dtype: torch.dtype) -> dict[str, torch.Tensor | float]:
    """Arguments of gated_norm_, strided as the mixer's are: z in a projection, the factors behind y."""
    generator = torch.Generator().manual_seed(tokens)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)

    wide = normal(tokens, d_inner + 8)
    return {
        "y": wide[:, :d_inner] * torch.logspace(-2, 2, max(tokens, 1), device=DEVICE)[:tokens, None].to(dtype),
        "z": normal(tokens, 2 * d_inner)[:, :d_inner],
        "weight": normal(d_inner),
        "eps": EPS,
        "row_scale": torch.full((tokens, 10), float("nan"), dtype=dtype, device=DEVICE)[:, 4:6],
    }


def normalized(gated: torch.Tensor, row_scale: torch.Tensor) -> torch.Tensor:
    return gated.double() * row_scale.double().sum(1, keepdim=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("shape", [(1, 64), (5, 96), (0, 64)], ids=["one-row", "96-channels", "no-rows"])
def test_gated_norm(shape: tuple[int, int], dtype: torch.dtype):
    inputs = gate_inputs(*shape, dtype)
    gated, factor = gated_norm_reference(*(inputs[name].double() for name in ("y", "z", "weight")), EPS)
    gated_norm_(**inputs)
    assert relative_error(inputs["y"], gated) < TOLERANCES[dtype] or shape[0] == 0
    # two bfloat16 hold the factor to 2^-16
    torch.testing.assert_close(inputs["row_scale"].double().sum(1), factor, rtol=2e-5, atol=0)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("shape", "strongest"), [((4, 16, 1, 16), 4.0), ((2, 64, 1, 128), 4.0), ((4, 16, 2, 16), 100.0)],
    ids=["several-heads-a-program", "headdim-64", "strong-decay"],
)  # fmt: skip
def test_ssd_gates(shape: tuple[int, int, int, int], strongest: float, dtype: torch.dtype):
    inputs = ssd_inputs((3, 1, 70, 0, 64), shape, dtype, strongest=strongest)
    tokens, d_inner = len(inputs["x"]), shape[0] * shape[1]
    gate = gate_inputs(tokens, d_inner, dtype)
    double = {name: value.double() if name in ("x", "state") else value for name, value in inputs.items()}
    y = ssd_reference(**double).flatten(1)
    expected, factor = gated_norm_reference(y, gate["z"].double(), gate["weight"].double(), EPS)
    out = torch.empty((tokens, d_inner + 8), dtype=dtype, device=DEVICE)[:, :d_inner]
    heads = shape[:2]
    ssd(
        **inputs, out=out.unflatten(1, heads), z=gate["z"].unflatten(1, heads),
        norm_weight=gate["weight"], norm_eps=EPS, row_scale=gate["row_scale"],
    )  # fmt: skip
    assert relative_error(out, expected) < 2 * TOLERANCES[dtype]
    assert relative_error(normalized(out, gate["row_scale"]), expected * factor[:, None]) < 2 * TOLERANCES[dtype]
    state = inputs["state"].clone()
    assert relative_error(state, double["state"].to(state.dtype)) < 2 * TOLERANCES[dtype]


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("z", torch.zeros(2, 63), "z must have shape"),
        ("weight", torch.zeros(32), "y must have shape"),
        ("row_scale", torch.zeros(2, 3), "row_scale must have shape"),
        ("y", torch.zeros(2, 64, dtype=torch.float16), "y must be torch.bfloat16 or torch.float32"),
    ],
)
def test_gated_norm_rejects(name: str, wrong: torch.Tensor, message: str):
    inputs = {
        key: value.cpu() if isinstance(value, torch.Tensor) else value
        for key, value in gate_inputs(2, 64, torch.float32).items()
    }
    with pytest.raises(ValueError, match=message):
        gated_norm_(**(inputs | {name: wrong}))


def test_ssd_needs_the_whole_gate():
    inputs = ssd_inputs((4,))
    with pytest.raises(ValueError, match="z needs norm_weight"):
        ssd(**inputs, z=inputs["x"])


def test_ssd_gate_is_not_for_float16():
    if IS_INTERPRETED:
        pytest.skip("the check comes before any kernel: once is enough")
    inputs = ssd_inputs((4,), dtype=torch.float16)
    scale = torch.empty((4, 2), dtype=torch.float16, device=DEVICE)
    weight = torch.ones(64, device=DEVICE)
    with pytest.raises(ValueError, match=r"y must be torch\.bfloat16"):
        ssd(**inputs, z=torch.zeros_like(inputs["x"]), norm_weight=weight, norm_eps=EPS, row_scale=scale)
