import pytest
import torch
from scan_inputs import DEVICE, TOLERANCES, in_float64, relative_error

from vllm_longmamba.kernels import causal_conv1d, causal_conv1d_reference, filter_dt_reference


def conv_inputs(
    lengths: tuple[int, ...],
    channels: int,
    width: int = 4,
    dtype: torch.dtype = torch.float32,
    nheads: int | None = 5,
    has_bias: bool = True,
) -> dict[str, torch.Tensor | None]:
    """Every second sequence starts from its slot, rows go round, 2 tokens are no prompt; x and dt are slices."""
    generator = torch.Generator().manual_seed(sum(lengths) + channels)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    tokens, nseq = sum(lengths), len(lengths)
    int32 = {"dtype": torch.int32, "device": DEVICE}
    projection = normal(tokens, 3 + channels + (nheads or 0)).to(dtype).to(DEVICE)
    inputs = {
        "x": projection[:, 3 : 3 + channels],
        "weight": normal(channels, width).to(dtype).to(DEVICE),
        "bias": normal(channels).to(dtype).to(DEVICE) if has_bias else None,
        # vLLM's layout: channels innermost
        "conv_state": normal(nseq + 2, width - 1, channels).to(dtype).to(DEVICE).transpose(1, 2),
        "query_start_loc": torch.tensor([0, *torch.tensor(lengths).cumsum(0)], **int32),
        "state_indices": torch.arange(nseq, 0, -1, **int32),
        "has_initial_state": (torch.arange(nseq) % 2 == 0).to(DEVICE),
    }
    if nheads:
        dt_threshold = 2.0 * torch.rand(3, nheads, generator=generator)
        dt_threshold[0] = -1.0
        dt_threshold[:, ::3] = -1.0
        inputs |= {
            "dt": projection[:, 3 + channels :],
            "dt_bias": normal(nheads).to(DEVICE),
            "dt_threshold": dt_threshold.to(DEVICE),
            "seq_rows": (torch.arange(nseq, **int32) + 1) % 3,
            "seq_prompt_tokens": torch.tensor([max(0, length - 2) for length in lengths], **int32),
        }
    return inputs


@pytest.mark.parametrize("width", [4, 2], ids=["width=4", "width=2"])
@pytest.mark.parametrize("channels", [5, 131], ids=["one-block", "two-blocks"])
@pytest.mark.parametrize("lengths", [(1,), (2, 1, 33, 70, 3)], ids=["one-token", "batch"])
def test_causal_conv1d(lengths: tuple[int, ...], channels: int, width: int):
    inputs = conv_inputs(lengths, channels, width)
    before = inputs["dt"].clone()
    token_rows = torch.zeros(len(before), dtype=torch.int32, device=DEVICE)
    for start, row, count in zip(
        inputs["query_start_loc"].tolist(), inputs["seq_rows"], inputs["seq_prompt_tokens"].tolist(), strict=False
    ):
        token_rows[start : start + count] = row
    expected_inputs = in_float64(inputs)
    expected = causal_conv1d_reference(**expected_inputs)
    out = causal_conv1d(**inputs, out=torch.full_like(inputs["x"], float("nan")))
    assert relative_error(out, expected) < TOLERANCES[torch.float32]
    assert relative_error(inputs["conv_state"], expected_inputs["conv_state"]) == 0
    filter_dt_reference(before, inputs["dt_bias"], inputs["dt_threshold"], token_rows)
    torch.testing.assert_close(inputs["dt"], before, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_causal_conv1d_half_precision(dtype: torch.dtype):
    inputs = conv_inputs((5, 40), 20, dtype=dtype)
    expected = causal_conv1d_reference(**in_float64(inputs))
    assert relative_error(causal_conv1d(**inputs), expected) < TOLERANCES[dtype]


def test_causal_conv1d_without_filter_bias_and_activation():
    inputs = conv_inputs((5, 40), 20, nheads=None, has_bias=False)
    expected = causal_conv1d_reference(**in_float64(inputs), silu=False)
    assert relative_error(causal_conv1d(**inputs, silu=False), expected) < TOLERANCES[torch.float32]


def test_causal_conv1d_leaves_null_block_alone():
    inputs = conv_inputs((4, 9, 0, 3), 6)
    inputs["state_indices"][1] = 0
    before, dt = inputs["conv_state"].clone(), inputs["dt"].clone()
    out = causal_conv1d(**inputs, out=torch.full_like(inputs["x"], 7.0))
    assert (out[4:13] == 7.0).all()
    torch.testing.assert_close(inputs["dt"][4:13], dt[4:13], rtol=0, atol=0)
    # the null block, the slot of the sequence without tokens, and a slot that nobody named
    for slot in (0, 2, 3, 5):
        torch.testing.assert_close(inputs["conv_state"][slot], before[slot], rtol=0, atol=0)


@pytest.mark.parametrize("cut", [1, 2, 32, 38], ids=["after-1", "after-2", "after-a-block", "before-2"])
def test_causal_conv1d_cut_prompt(cut: int):
    inputs = conv_inputs((40,), 9, nheads=None)
    whole = {**inputs, "conv_state": inputs["conv_state"].clone()}
    expected = causal_conv1d(**whole)
    parts = []
    for start, end in ((0, cut), (cut, 40)):
        part = {"x": inputs["x"][start:end], "has_initial_state": torch.full_like(inputs["has_initial_state"], True)}
        part["query_start_loc"] = torch.tensor([0, end - start], dtype=torch.int32, device=DEVICE)
        parts.append(causal_conv1d(**(inputs | part)))
    torch.testing.assert_close(torch.cat(parts), expected)
    torch.testing.assert_close(inputs["conv_state"], whole["conv_state"], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("x", torch.zeros(6, 4).T, "stride 1"),
        ("weight", torch.zeros(6, 1), "weight"),
        ("weight", torch.zeros(4, 6).T, "weight must be contiguous"),
        ("bias", torch.zeros(5), "bias must have shape"),
        ("conv_state", torch.zeros(3, 6, 4), "conv_state must be"),
        ("state_indices", torch.zeros(1, dtype=torch.int64), "state_indices must be"),
        ("has_initial_state", torch.zeros(1, dtype=torch.int32), "has_initial_state must be"),
        ("dt", None, "dt_threshold needs dt"),
        ("dt_threshold", torch.zeros(3, 4), "dt_threshold must have shape"),
        ("out", torch.zeros(4, 6, dtype=torch.bfloat16), "out must be"),
    ],
)
def test_causal_conv1d_rejects(name: str, wrong: torch.Tensor | None, message: str):
    inputs = {key: tensor.cpu() for key, tensor in conv_inputs((4,), 6).items()}
    with pytest.raises(ValueError, match=message):
        causal_conv1d(**(inputs | {name: wrong}))
