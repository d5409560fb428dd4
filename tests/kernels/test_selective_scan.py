import os
import subprocess
import sys

import pytest
import torch
from scan_inputs import DEVICE, IS_INTERPRETED, RUNS_TRITON, TOLERANCES, in_float64, relative_error, scan_inputs

from vllm_longmamba.kernels import selective_scan, selective_scan_reference

LENGTHS = {
    "one-token": (1,),
    "one-group": (8,),
    "odd": (19,),
    "batch": (3, 1, 24, 9),
}
if not IS_INTERPRETED:
    LENGTHS["long"] = (300, 77)


def check(inputs: dict, dtype: torch.dtype, run=selective_scan) -> None:
    expected_inputs = in_float64(inputs)
    expected = selective_scan_reference(**expected_inputs)
    out = torch.full_like(inputs["x"], float("nan"))
    run(**inputs, out=out)
    assert relative_error(out, expected) < TOLERANCES[dtype]
    assert relative_error(inputs["state"], expected_inputs["state"]) < TOLERANCES[inputs["state"].dtype]


@pytest.mark.parametrize("is_filtered", [False, True], ids=["plain", "filtered"])
@pytest.mark.parametrize(("d_inner", "d_state"), [(13, 16), (10, 5)], ids=["d_state=16", "d_state=5"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_selective_scan(lengths: tuple[int, ...], d_inner: int, d_state: int, is_filtered: bool):
    check(scan_inputs(lengths, d_inner, d_state, is_filtered=is_filtered), torch.float32)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=["state-fp32", "state-bf16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_selective_scan_half_precision(dtype: torch.dtype, state_dtype: torch.dtype):
    check(scan_inputs((5, 12), 9, 16, dtype, state_dtype), dtype)


def test_selective_scan_of_B_and_C_side_by_side():  # noqa: N802
    inputs = scan_inputs((5, 12), 9, 16, torch.bfloat16)
    # as x_proj hands them out: read where they lie, not packed first
    projection = torch.cat([torch.zeros_like(inputs["B"]), inputs["B"], inputs["C"]], 1)
    check(inputs | {"B": projection[:, 16:32], "C": projection[:, 32:]}, torch.bfloat16)


def test_selective_scan_filters_a_dt_equal_to_the_threshold():
    """Above 20 softplus is exact. Tokens that are all filtered leave the state as it was."""
    inputs = scan_inputs((6,), 4, 3)
    inputs["dt"].fill_(30.0)
    inputs["dt_bias"].zero_()
    inputs["dt_threshold"].fill_(30.0)
    inputs["seq_prompt_tokens"].fill_(6)
    before = inputs["state"].clone()
    selective_scan(**inputs)
    torch.testing.assert_close(inputs["state"], before, rtol=0, atol=0)


def test_selective_scan_without_gate():
    check(scan_inputs((4, 11), 9, 4) | {"z": None}, torch.float32)


def test_selective_scan_in_place_of_gate():
    inputs = scan_inputs((4, 11), 9, 4)
    expected = selective_scan_reference(**in_float64(inputs))
    assert selective_scan(**inputs, out=inputs["z"]) is inputs["z"]
    assert relative_error(inputs["z"], expected) < TOLERANCES[torch.float32]


@pytest.mark.parametrize("lengths", [(), (0,)], ids=["no-sequences", "no-tokens"])
def test_selective_scan_empty(lengths: tuple[int, ...]):
    inputs = scan_inputs(lengths, 6, 4)
    before = inputs["state"].clone()
    assert selective_scan(**inputs).shape == (0, 6)
    torch.testing.assert_close(inputs["state"], before, rtol=0, atol=0)


def test_selective_scan_leaves_null_block_alone():
    inputs = scan_inputs((4, 9, 0, 3), 6, 4)
    inputs["state_indices"][1] = 0
    before = inputs["state"].clone()
    out = torch.full_like(inputs["x"], 7.0)
    expected_inputs = in_float64(inputs)
    expected = selective_scan_reference(**expected_inputs, out=out.double())
    selective_scan(**inputs, out=out)
    assert relative_error(out, expected) < TOLERANCES[torch.float32]
    assert relative_error(inputs["state"], expected_inputs["state"]) < TOLERANCES[torch.float32]
    # the null block, the slot of the sequence without tokens, and a slot that nobody named
    for slot in (0, 2, 5):
        torch.testing.assert_close(inputs["state"][slot], before[slot], rtol=0, atol=0)


@pytest.mark.parametrize("cut", [1, 8, 13], ids=["after-1", "after-a-group", "after-13"])
def test_selective_scan_cut_prompt(cut: int):
    inputs = scan_inputs((20,), 9, 5)
    whole = {**inputs, "state": inputs["state"].clone()}
    expected = selective_scan(**whole)
    parts = []
    for start, end in ((0, cut), (cut, 20)):
        part = {name: inputs[name][start:end] for name in ("x", "dt", "B", "C", "z")}
        part["query_start_loc"] = torch.tensor([0, end - start], dtype=torch.int32, device=DEVICE)
        part["seq_prompt_tokens"] = (inputs["seq_prompt_tokens"] - start).clamp(0, end - start)
        part["has_initial_state"] = torch.full_like(inputs["has_initial_state"], True)
        parts.append(selective_scan(**(inputs | part)))
    # the state goes through the float32 cache without rounding
    assert relative_error(torch.cat(parts), expected) < TOLERANCES[torch.float32]
    assert relative_error(inputs["state"], whole["state"]) < TOLERANCES[torch.float32]


@pytest.mark.skipif(RUNS_TRITON, reason="numba runs on CPUs only")
def test_selective_scan_leaves_pytorch_its_threads():
    # in a process of its own: numba starts its threads once
    call = """
import torch
from scan_inputs import scan_inputs
from vllm_longmamba.kernels import selective_scan
before = torch.get_num_threads()
selective_scan(**scan_inputs((5,), 200, 4))
assert before == torch.get_num_threads() == 1, (before, torch.get_num_threads())
"""
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_NUM_THREADS"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", call], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.mark.skipif(not RUNS_TRITON, reason="chunks exist on a GPU and in Triton's interpreter only")
@pytest.mark.parametrize("lengths", [(40,), (17, 1, 8, 0, 5)], ids=["one-sequence", "batch"])
@pytest.mark.parametrize("chunk", [8, 16], ids=["chunk=8", "chunk=16"])
def test_selective_scan_chunks(lengths: tuple[int, ...], chunk: int):
    from vllm_longmamba.kernels.selective_scan_triton import selective_scan_triton

    check(
        scan_inputs(lengths, 13, 5, is_filtered=True),
        torch.float32,
        lambda **inputs: selective_scan_triton(**inputs, chunk=chunk),
    )


def wrong_arguments() -> dict[str, tuple[str, torch.Tensor | None, str]]:
    zeros = torch.zeros
    return {
        "x-layout": ("x", zeros(6, 4).T, "x's last dimension must have stride 1"),
        "x-shape": ("x", zeros(6), "x must be"),
        "dt": ("dt", zeros(4, 5), "dt must have shape"),
        "A-dtype": ("A", zeros(6, 3, dtype=torch.bfloat16), "A must be torch.float32"),
        "B": ("B", zeros(3, 4).T, "B's last dimension"),
        "D": ("D", zeros(5), "D must have shape"),
        "z": ("z", zeros(4, 6, dtype=torch.float64), "z must be"),
        "state-shape": ("state", zeros(5, 3, 6), "state must have shape"),
        "state-layout": ("state", zeros(5, 3, 6).transpose(1, 2), "state"),
        "query_start_loc": ("query_start_loc", zeros(2, dtype=torch.int64), "query_start_loc must be torch.int32"),
        "has_initial_state": ("has_initial_state", zeros(1, dtype=torch.int32), "has_initial_state must be torch.bool"),
        "dt_threshold": ("dt_threshold", zeros(3, 5), "dt_threshold must have shape"),
        "seq_rows": ("seq_rows", None, "seq_rows"),
        "out": ("out", zeros(4, 6, dtype=torch.bfloat16), "out must be torch.float32"),
    }


@pytest.mark.parametrize(("name", "wrong", "message"), wrong_arguments().values(), ids=wrong_arguments().keys())
def test_selective_scan_rejects(name: str, wrong: torch.Tensor | None, message: str):
    inputs = scan_inputs((4,), 6, 3)
    inputs = {key: tensor.cpu() if tensor is not None else None for key, tensor in inputs.items()}
    with pytest.raises(ValueError, match=message):
        selective_scan(**(inputs | {name: wrong}))
