import pytest
import torch
from scan_inputs import DEVICE, TOLERANCES, in_float64, relative_error

from vllm_longmamba.kernels import selective_state_update, selective_state_update_reference


def update_inputs(
    batch: int,
    nheads: int | None = None,
    headdim: int = 13,
    d_state: int = 16,
    ngroups: int = 1,
    dtype: torch.dtype = torch.float32,
    state_dtype: torch.dtype = torch.float32,
) -> dict[str, torch.Tensor | None]:
    """Mamba-1 of `headdim` channels where `nheads` is None. Rows of the table go round; B, C and z are slices."""
    generator = torch.Generator().manual_seed(batch + d_state)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    d_inner = headdim * (nheads or 1)
    channels = nheads or d_inner
    projection = normal(batch, 2 * d_inner + 2 * ngroups * d_state + channels).to(dtype).to(DEVICE)
    x, z, B, C, dt = projection.split([d_inner, d_inner, ngroups * d_state, ngroups * d_state, channels], dim=1)
    # Independent of B, C would almost cancel the state in some batches of one, and magnify the rounding of any sum.
    C += B
    cache = normal(batch + 3, d_inner * d_state + 7).to(state_dtype).to(DEVICE)
    dt_threshold = 2.0 * torch.rand(3, channels, generator=generator)
    dt_threshold[0] = -1.0
    dt_threshold[:, ::3] = -1.0
    int32 = {"dtype": torch.int32, "device": DEVICE}
    return {
        "state": cache[:, : d_inner * d_state].unflatten(1, (d_inner, d_state)),
        "x": x,
        "dt": dt,
        "A": (-4.0 * torch.rand(channels, *([] if nheads else [d_state]), generator=generator)).to(DEVICE),
        "B": B,
        "C": C,
        "D": normal(channels).to(DEVICE),
        "z": z if nheads is None else None,
        "dt_bias": normal(channels).to(DEVICE),
        # the first column of vLLM's block table, which has others
        "state_indices": torch.stack([torch.arange(batch, 0, -1, **int32)] * 2, 1)[:, 0],
        "dt_threshold": dt_threshold.to(DEVICE),
        "token_rows": torch.arange(batch, **int32) % 3,
    }


def check(inputs: dict, dtype: torch.dtype) -> None:
    expected_inputs = in_float64(inputs)
    expected = selective_state_update_reference(**expected_inputs)
    out = selective_state_update(**inputs, out=torch.full_like(inputs["x"], float("nan")))
    is_row = inputs["state_indices"] != 0
    assert not out.isnan().any()
    assert relative_error(out[is_row], expected[is_row]) < TOLERANCES[dtype]
    assert relative_error(inputs["state"], expected_inputs["state"]) < TOLERANCES[inputs["state"].dtype]


@pytest.mark.parametrize("is_filtered", [False, True], ids=["plain", "filtered"])
@pytest.mark.parametrize(
    "shape",
    [
        {"headdim": 13, "d_state": 16},
        {"headdim": 200, "d_state": 5},
        {"nheads": 3, "headdim": 16, "d_state": 128},
        {"nheads": 4, "headdim": 5, "d_state": 12, "ngroups": 2},
    ],
    ids=["mamba1", "mamba1-odd", "mamba2", "mamba2-groups"],
)
@pytest.mark.parametrize("batch", [1, 5])
def test_selective_state_update(batch: int, shape: dict, is_filtered: bool):
    inputs = update_inputs(batch, **shape)
    if not is_filtered:
        inputs |= {"dt_threshold": None, "token_rows": None}
    check(inputs, torch.float32)


@pytest.mark.parametrize("nheads", [None, 3], ids=["mamba1", "mamba2"])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=["state-fp32", "state-bf16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_selective_state_update_half_precision(dtype: torch.dtype, state_dtype: torch.dtype, nheads: int | None):
    check(update_inputs(4, nheads, dtype=dtype, state_dtype=state_dtype), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("headdim", "rank"), [(13, 5), (70, 16)], ids=["odd", "blocks"])
def test_selective_state_update_projects_dt(headdim: int, rank: int, dtype: torch.dtype):
    inputs = update_inputs(5, headdim=headdim, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    projection = torch.randn(5, rank + 32, generator=generator).to(dtype).to(DEVICE)
    inputs["dt"], inputs["dt_weight"] = projection[:, :rank], torch.randn(headdim, rank, generator=generator)
    inputs["dt_weight"] = inputs["dt_weight"].to(dtype).to(DEVICE)
    check(inputs, dtype)


@pytest.mark.parametrize("nheads", [None, 3], ids=["mamba1", "mamba2"])
def test_selective_state_update_leaves_null_block_alone(nheads: int | None):
    inputs = update_inputs(4, nheads)
    inputs["state_indices"][1] = 0
    before = inputs["state"].clone()
    check(inputs, torch.float32)
    # the null block, the slot that row 1 had, and one that nobody named
    for slot in (0, 3, 5):
        torch.testing.assert_close(inputs["state"][slot], before[slot], rtol=0, atol=0)


def test_selective_state_update_row_0_filters_nothing():
    inputs = update_inputs(3)
    plain = inputs | {"state": inputs["state"].clone(), "dt_threshold": None, "token_rows": None}
    inputs["token_rows"].zero_()
    torch.testing.assert_close(selective_state_update(**inputs), selective_state_update(**plain), rtol=0, atol=0)


def test_selective_state_update_of_an_empty_batch():
    assert selective_state_update(**update_inputs(0)).shape == (0, 13)


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("x", torch.zeros(13, 2).T, "stride 1"),
        ("dt", torch.zeros(2, 12), "dt must have shape"),
        ("A", torch.zeros(5), "A must have one entry"),
        ("B", torch.zeros(2, 32), "B must be"),
        ("C", torch.zeros(2, 15), "C must have shape"),
        ("state", torch.zeros(5, 16, 13).transpose(1, 2), "state"),
        ("state_indices", torch.zeros(2, dtype=torch.int64), "state_indices must be"),
        ("token_rows", None, "token_rows"),
        ("dt_threshold", torch.zeros(3, 12), "dt_threshold must have shape"),
        ("dt_weight", torch.zeros(12, 13), "dt_weight must have shape"),
    ],
)
def test_selective_state_update_rejects(name: str, wrong: torch.Tensor | None, message: str):
    inputs = {key: tensor.cpu() if tensor is not None else None for key, tensor in update_inputs(2).items()}
    with pytest.raises(ValueError, match=message):
        selective_state_update(**(inputs | {name: wrong}))
