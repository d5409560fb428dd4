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


def with_checkpoints(inputs: dict, checkpoints: tuple[int, ...]) -> dict:
    """Also ask for the states behind so many tokens; what must be left alone is 7."""
    state = inputs["state"]
    return inputs | {
        "checkpoints": torch.tensor(checkpoints, dtype=torch.int32, device=DEVICE),
        "checkpoint_state": torch.full_like(state[0], 7.0).expand(len(checkpoints), -1, -1, -1).contiguous(),
    }


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
    for sequence in range(len(inputs.get("checkpoints", ()))):
        found, wanted = (states["checkpoint_state"][sequence] for states in (inputs, expected_inputs))
        assert relative_error(found, wanted) < tolerance
        if inputs["checkpoints"][sequence] == 0:
            assert (found == 7.0).all()


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


@pytest.mark.skipif(not RUNS_TRITON, reason="segments exist on a GPU and in Triton's interpreter only")
@pytest.mark.parametrize(
    "checkpoints", [(16, 0, 32, 0, 64, 96), (37, 1, 5, 0, 65, 33)], ids=["between-blocks", "in-blocks"]
)
def test_ssd_checkpoints_of_segments(checkpoints: tuple[int, ...]):
    from vllm_longmamba.kernels.ssd_triton import Sizes, ssd_triton

    def run(**inputs: torch.Tensor | None) -> None:
        ssd_triton(**inputs, sizes=Sizes(block=16, segment=32))

    # their ends among the checkpoints: of a segment, of a block and of neither
    inputs = ssd_inputs((70, 1, 64, 0, 65, 96), (4, 16, 2, 16))
    inputs["A"] = torch.tensor([-0.1, -4.0, -20.0, -100.0], device=DEVICE)
    check(with_checkpoints(inputs, checkpoints), run)


@pytest.mark.parametrize(
    ("d_state", "is_filtered"), [(20, False), (64, True), (128, True)], ids=["d_state-20-plain", "64", "128"]
)
def test_ssd_checkpoints(d_state: int, is_filtered: bool):
    inputs = ssd_inputs((70, 3, 40), (2, 32, 1, d_state), is_filtered=is_filtered)
    check(with_checkpoints(inputs, (64, 0, 27)))


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=["state-fp32", "state-bf16"])
@pytest.mark.parametrize("dtype", [BF16, pytest.param(torch.float16, id="fp16")])
def test_ssd_checkpoints_half_precision(dtype: torch.dtype, state_dtype: torch.dtype):
    check(with_checkpoints(ssd_inputs((70, 9), (2, 64, 1, 128), dtype, state_dtype), (45, 9)))


def test_ssd_continues_from_a_checkpoint():
    inputs = with_checkpoints(ssd_inputs((90,), (2, 16, 1, 16)), (48,))
    expected = ssd(**inputs)
    rest = {name: inputs[name][48:] for name in ("x", "dt", "B", "C")}
    rest["query_start_loc"] = torch.tensor([0, 42], dtype=torch.int32, device=DEVICE)
    rest["seq_prompt_tokens"] = inputs["seq_prompt_tokens"] - 48
    rest["has_initial_state"] = torch.full_like(inputs["has_initial_state"], True)
    rest["state"] = torch.cat([torch.zeros_like(inputs["checkpoint_state"]), inputs["checkpoint_state"]])
    found = ssd(**(inputs | rest | {"checkpoints": None, "checkpoint_state": None}))
    assert relative_error(found, expected[48:]) < TOLERANCES[torch.float32]
    assert relative_error(rest["state"][1], inputs["state"][1]) < TOLERANCES[torch.float32]


@pytest.mark.parametrize("lengths", [(), (0,)], ids=["no-sequences", "no-tokens"])
def test_ssd_empty(lengths: tuple[int, ...]):
    inputs = ssd_inputs(lengths)
    before = inputs["state"].clone()
    assert ssd(**inputs).shape == (0, 4, 16)
    torch.testing.assert_close(inputs["state"], before, rtol=0, atol=0)


def test_ssd_leaves_null_block_alone():
    inputs = with_checkpoints(ssd_inputs((4, 40, 0, 3)), (2, 20, 0, 3))
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
    assert (inputs["checkpoint_state"][1] == 7.0).all()


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
        "checkpoints": ("checkpoints", zeros(1, dtype=torch.int64), "checkpoints must be torch.int32"),
        "checkpoints-alone": ("checkpoint_state", None, "checkpoints and checkpoint_state need each other"),
        "checkpoint_state": ("checkpoint_state", zeros(1, 4, 16, 17), "checkpoint_state must have shape"),
        "out": ("out", zeros(4, 4, 16, dtype=torch.bfloat16), "out must be torch.float32"),
    }


@pytest.mark.parametrize(("name", "wrong", "message"), wrong_arguments().values(), ids=wrong_arguments().keys())
def test_ssd_rejects(name: str, wrong: torch.Tensor | None, message: str):
    inputs = with_checkpoints(ssd_inputs((4,)), (2,))
    inputs = {key: tensor.cpu() if tensor is not None else None for key, tensor in inputs.items()}
    with pytest.raises(ValueError, match=message):
        ssd(**(inputs | {name: wrong}))
