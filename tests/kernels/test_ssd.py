import pytest
import torch
from scan_inputs import DEVICE, IS_INTERPRETED, RUNS_TRITON, TOLERANCES, in_float64, relative_error

from vllm_longmamba.kernels import ssd_reference
from vllm_longmamba.kernels.ssd import ssd

LENGTHS = {"one-token": (1,), "one-block": (32,), "batch": (3, 1, 70, 0, 64)}
# nheads, headdim, ngroups, d_state
SHAPES = {
    "headdim-32": (2, 32, 1, 64),
    "headdim-64": (2, 64, 1, 128),
    "groups": (4, 16, 2, 16),
    "d_state-20": (1, 16, 1, 20),
}


# Triton's interpreter multiplies the bits of bfloat16 matrices as if they were integers
BF16 = pytest.param(
    torch.bfloat16,
    id="bf16",
    marks=pytest.mark.skipif(IS_INTERPRETED, reason="no bfloat16 products in the interpreter"),
)


def ssd_inputs(
    lengths: tuple[int, ...],
    shape: tuple[int, int, int, int] = (4, 16, 1, 16),
    dtype: torch.dtype = torch.float32,
    state_dtype: torch.dtype = torch.float32,
    is_filtered: bool = True,
    strongest: float = 4.0,
) -> dict[str, torch.Tensor | None]:
    """Arguments of ssd: every second sequence starts from its slot, rows go round, 2 tokens are no prompt.

    x, B and C are slices of one projection, as after the convolution. A lies between 0 and -strongest.
    """
    generator = torch.Generator().manual_seed(0)
    nheads, headdim, ngroups, d_state = shape
    tokens, nseq, rows = sum(lengths), len(lengths), 3

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator)

    sizes = [nheads * headdim, ngroups * d_state, ngroups * d_state, 5]
    x, B, C, _ = normal(tokens, sum(sizes)).to(dtype).to(DEVICE).split(sizes, dim=1)
    cache = normal(nseq + 2, nheads * headdim * d_state + 8).to(state_dtype).to(DEVICE)
    dt_threshold = 0.3 * torch.rand(rows, nheads, generator=generator)
    dt_threshold[0] = -1.0
    dt_threshold[:, ::3] = -1.0
    int32 = {"dtype": torch.int32, "device": DEVICE}
    inputs = {
        "x": x.unflatten(1, (nheads, headdim)),
        "dt": (normal(tokens, nheads + 3) - 2.0).to(dtype).to(DEVICE)[:, :nheads],
        "A": (-strongest * torch.rand(nheads, generator=generator)).to(DEVICE),
        "B": B.unflatten(1, (ngroups, d_state)),
        "C": C.unflatten(1, (ngroups, d_state)),
        "D": normal(nheads).to(DEVICE),
        "dt_bias": normal(nheads).to(DEVICE),
        "state": cache[:, :-8].unflatten(1, (nheads, headdim, d_state)),
        "query_start_loc": torch.tensor([0, *torch.tensor(lengths).cumsum(0)], **int32),
        "state_indices": torch.arange(nseq, 0, -1, **int32),
        "has_initial_state": (torch.arange(nseq) % 2 == 0).to(DEVICE),
    }
    if is_filtered:
        inputs |= {
            "dt_threshold": dt_threshold.to(DEVICE),
            "seq_rows": (torch.arange(nseq, **int32) + 1) % rows,
            "seq_prompt_tokens": torch.tensor([max(0, length - 2) for length in lengths], **int32),
        }
    return inputs


def check(inputs: dict, run=ssd) -> None:
    expected_inputs = in_float64(inputs)
    expected = ssd_reference(**expected_inputs)
    # a strided tensor, as the mixer's output is
    out = torch.full((*inputs["x"].shape[:1], 2, *inputs["x"].shape[1:]), float("nan")).to(inputs["x"])[:, 1]
    run(**inputs, out=out)
    assert relative_error(out, expected) < TOLERANCES[inputs["x"].dtype]
    # what feeds the state is rounded to x's type in front of the matrix products
    tolerance = max(TOLERANCES[inputs["x"].dtype], TOLERANCES[inputs["state"].dtype])
    assert relative_error(inputs["state"], expected_inputs["state"]) < tolerance


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_ssd(lengths: tuple[int, ...], shape: tuple[int, int, int, int]):
    check(ssd_inputs(lengths, shape))


def test_ssd_plain():
    check(ssd_inputs((40, 9), is_filtered=False))


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=["state-fp32", "state-bf16"])
@pytest.mark.parametrize("dtype", [BF16, pytest.param(torch.float16, id="fp16")])
def test_ssd_half_precision(dtype: torch.dtype, state_dtype: torch.dtype):
    check(ssd_inputs((70, 9), (2, 64, 1, 128), dtype, state_dtype))


@pytest.mark.parametrize("dtype", [BF16, pytest.param(torch.float32, id="fp32")])
def test_ssd_strong_decay(dtype: torch.dtype):
    # a block decays by little; by enough to scale anew; by more than the factored way takes; beyond float32
    inputs = ssd_inputs((130, 40), dtype=dtype)
    inputs["A"] = torch.tensor([-0.1, -4.0, -20.0, -100.0], device=DEVICE)
    check(inputs)


@pytest.mark.skipif(not RUNS_TRITON, reason="segments exist on a GPU and in Triton's interpreter only")
@pytest.mark.parametrize("is_factored", [True, False], ids=["factored", "exact"])
@pytest.mark.parametrize("lengths", [(160,), (70, 1, 64, 0, 65)], ids=["one-sequence", "batch"])
def test_ssd_segments(lengths: tuple[int, ...], is_factored: bool):
    from vllm_longmamba.kernels.ssd_triton import Sizes, ssd_triton

    def run(**inputs: torch.Tensor | None) -> None:
        sizes = Sizes(block=16, segment=32, is_factored=is_factored)
        ssd_triton(**inputs, sizes=sizes)

    check(ssd_inputs(lengths, (2, 16, 1, 16), strongest=20.0), run)


@pytest.mark.parametrize("lengths", [(), (0,)], ids=["no-sequences", "no-tokens"])
def test_ssd_empty(lengths: tuple[int, ...]):
    inputs = ssd_inputs(lengths)
    before = inputs["state"].clone()
    assert ssd(**inputs).shape == (0, 4, 16)
    torch.testing.assert_close(inputs["state"], before, rtol=0, atol=0)


def test_ssd_leaves_null_block_alone():
    inputs = ssd_inputs((4, 40, 0, 3))
    inputs["state_indices"][1] = 0
    before = inputs["state"].clone()
    out = torch.full_like(inputs["x"], 7.0)
    expected_inputs = in_float64(inputs)
    expected = ssd_reference(**expected_inputs)
    expected[4:44] = 7.0
    ssd(**inputs, out=out)
    assert relative_error(out, expected) < TOLERANCES[torch.float32]
    assert relative_error(inputs["state"], expected_inputs["state"]) < TOLERANCES[torch.float32]
    # the null block, the slot of the sequence without tokens, and a slot that nobody named
    for slot in (0, 2, 5):
        torch.testing.assert_close(inputs["state"][slot], before[slot], rtol=0, atol=0)


@pytest.mark.parametrize("cut", [1, 32, 41], ids=["after-1", "after-a-block", "after-41"])
def test_ssd_cut_prompt(cut: int):
    inputs = ssd_inputs((60,), (2, 16, 1, 16))
    whole = {**inputs, "state": inputs["state"].clone()}
    expected = ssd(**whole)
    parts = []
    for start, end in ((0, cut), (cut, 60)):
        part = {name: inputs[name][start:end] for name in ("x", "dt", "B", "C")}
        part["query_start_loc"] = torch.tensor([0, end - start], dtype=torch.int32, device=DEVICE)
        part["seq_prompt_tokens"] = (inputs["seq_prompt_tokens"] - start).clamp(0, end - start)
        part["has_initial_state"] = torch.full_like(inputs["has_initial_state"], True)
        parts.append(ssd(**(inputs | part)))
    assert relative_error(torch.cat(parts), expected) < TOLERANCES[torch.float32]
    assert relative_error(inputs["state"], whole["state"]) < TOLERANCES[torch.float32]


def wrong_arguments() -> dict[str, tuple[str, torch.Tensor | None, str]]:
    zeros = torch.zeros
    return {
        "x-shape": ("x", zeros(4, 64), "x must be"),
        "x-layout": ("x", zeros(4, 16, 4).transpose(1, 2), "x's last dimension must have stride 1"),
        "x-heads": ("x", zeros(4, 8, 16)[:, ::2], "adjacent"),
        "headdim": ("x", zeros(4, 4, 24), "headdim must be a power of two"),
        "dt": ("dt", zeros(4, 5), "dt must have shape"),
        "A-dtype": ("A", zeros(4, dtype=torch.bfloat16), "A must be torch.float32"),
        "B": ("B", zeros(3, 1, 16), "B must have shape"),
        "C-dtype": ("C", zeros(4, 1, 16, dtype=torch.bfloat16), "C must be torch.float32"),
        "state": ("state", zeros(5, 4, 16, 17), "state must have shape"),
        "query_start_loc": ("query_start_loc", zeros(2, dtype=torch.int64), "query_start_loc must be torch.int32"),
        "dt_threshold": ("dt_threshold", zeros(3, 5), "dt_threshold must have shape"),
        "seq_rows": ("seq_rows", None, "seq_rows"),
        "out": ("out", zeros(4, 4, 16, dtype=torch.bfloat16), "out must be torch.float32"),
    }


@pytest.mark.parametrize(("name", "wrong", "message"), wrong_arguments().values(), ids=wrong_arguments().keys())
def test_ssd_rejects(name: str, wrong: torch.Tensor | None, message: str):
    inputs = {key: tensor.cpu() if tensor is not None else None for key, tensor in ssd_inputs((4,)).items()}
    with pytest.raises(ValueError, match=message):
        ssd(**(inputs | {name: wrong}))
