"""The references against loops over single numbers, in float64."""

import math

import pytest
import torch
from scan_inputs import in_float64
from scan_inputs import scan_inputs as device_inputs

from vllm_longmamba.kernels import filter_dt_reference, selective_scan_reference, ssd_reference

# both sides are float64 and differ in the order of a few sums
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def scan_inputs(*args, **kwargs) -> dict:
    inputs = device_inputs(*args, **kwargs)
    return {name: tensor.cpu() if tensor is not None else None for name, tensor in inputs.items()}


def filtered_dt(raw: float, bias: float, threshold: float | None) -> float:
    dt = raw + bias
    dt = dt if dt > 20 else math.log1p(math.exp(dt))
    return 0.0 if threshold is not None and dt <= threshold else dt


def threshold_of(inputs: dict, sequence: int, position: int, channel: int) -> float | None:
    if inputs["dt_threshold"] is None or position >= inputs["seq_prompt_tokens"][sequence]:
        return None
    return inputs["dt_threshold"][inputs["seq_rows"][sequence], channel].item()


@pytest.mark.parametrize("is_filtered", [False, True], ids=["plain", "filtered"])
@pytest.mark.parametrize("has_gate", [False, True], ids=["no-gate", "gate"])
def test_selective_scan_reference(is_filtered: bool, has_gate: bool):
    inputs = in_float64(scan_inputs((5, 1, 3), d_inner=3, d_state=5, is_filtered=is_filtered))
    # A dt equal to the threshold is filtered; the softplus of this one is exact.
    inputs["dt"][0, 1], inputs["dt_bias"][1] = 30.0, 0.0
    if is_filtered:
        inputs["dt_threshold"][inputs["seq_rows"][0], 1] = 30.0
    # Above 20 softplus is the identity, below it is not yet.
    inputs["dt"][0, 0], inputs["dt"][1, 0] = 30.0, 12.0
    inputs["z"] = inputs["z"] if has_gate else None
    state = inputs["state"].clone()
    out = selective_scan_reference(**inputs)

    starts = inputs["query_start_loc"].tolist()
    for sequence, slot in enumerate(inputs["state_indices"].tolist()):
        for channel in range(3):
            h = state[slot, channel].tolist() if inputs["has_initial_state"][sequence] else [0.0] * 5
            for position in range(starts[sequence + 1] - starts[sequence]):
                token = starts[sequence] + position
                threshold = threshold_of(inputs, sequence, position, channel)
                dt = filtered_dt(inputs["dt"][token, channel].item(), inputs["dt_bias"][channel].item(), threshold)
                x = inputs["x"][token, channel].item()
                y = inputs["D"][channel].item() * x
                for n in range(5):
                    decay = math.exp(dt * inputs["A"][channel, n].item())
                    h[n] = decay * h[n] + dt * x * inputs["B"][token, n].item()
                    y += h[n] * inputs["C"][token, n].item()
                if has_gate:
                    z = inputs["z"][token, channel].item()
                    y *= z / (1 + math.exp(-z))
                assert out[token, channel].item() == pytest.approx(y, rel=1e-10, abs=1e-10)
            torch.testing.assert_close(inputs["state"][slot, channel], torch.tensor(h, dtype=torch.float64), **EXACT)


@pytest.mark.parametrize("is_filtered", [False, True], ids=["plain", "filtered"])
def test_ssd_reference(is_filtered: bool):
    nheads, headdim, ngroups, d_state = 4, 2, 2, 3
    inputs = in_float64(scan_inputs((4, 1, 3), d_inner=nheads, d_state=d_state, is_filtered=is_filtered))
    generator = torch.Generator().manual_seed(1)
    tokens = len(inputs["x"])
    del inputs["z"]
    inputs["x"] = torch.randn(tokens, nheads, headdim, generator=generator, dtype=torch.float64)
    inputs["A"] = inputs["A"][:, 0].contiguous()
    inputs["B"] = torch.randn(tokens, ngroups, d_state, generator=generator, dtype=torch.float64)
    inputs["C"] = torch.randn(tokens, ngroups, d_state, generator=generator, dtype=torch.float64)
    inputs["state"] = torch.randn(5, nheads, headdim, d_state, generator=generator, dtype=torch.float64)
    state = inputs["state"].clone()
    checkpoints = [3, 0, 3]
    checkpoint_state = torch.full((3, nheads, headdim, d_state), 7.0, dtype=torch.float64)
    out = ssd_reference(
        **inputs, checkpoints=torch.tensor(checkpoints, dtype=torch.int32), checkpoint_state=checkpoint_state
    )
    assert (checkpoint_state[1] == 7.0).all()

    starts = inputs["query_start_loc"].tolist()
    for sequence, slot in enumerate(inputs["state_indices"].tolist()):
        for head in range(nheads):
            group = head // (nheads // ngroups)
            for p in range(headdim):
                h = state[slot, head, p].tolist() if inputs["has_initial_state"][sequence] else [0.0] * d_state
                for position in range(starts[sequence + 1] - starts[sequence]):
                    token = starts[sequence] + position
                    threshold = threshold_of(inputs, sequence, position, head)
                    dt = filtered_dt(inputs["dt"][token, head].item(), inputs["dt_bias"][head].item(), threshold)
                    x = inputs["x"][token, head, p].item()
                    y = inputs["D"][head].item() * x
                    for n in range(d_state):
                        h[n] *= math.exp(dt * inputs["A"][head].item())
                        h[n] += dt * x * inputs["B"][token, group, n].item()
                        y += h[n] * inputs["C"][token, group, n].item()
                    assert out[token, head, p].item() == pytest.approx(y, rel=1e-10, abs=1e-10)
                    if position + 1 == checkpoints[sequence]:
                        found = checkpoint_state[sequence, head, p]
                        torch.testing.assert_close(found, torch.tensor(h, dtype=torch.float64), **EXACT)
                torch.testing.assert_close(
                    inputs["state"][slot, head, p], torch.tensor(h, dtype=torch.float64), **EXACT
                )


def test_filter_dt_reference():
    dt = torch.tensor([[-1.0, 2.0, 25.0], [-1.0, 2.0, 26.5], [-1.0, 2.0, 25.0]])
    expected = dt.clone()
    dt_bias = torch.tensor([0.5, -1.0, 0.0])
    dt_threshold = torch.tensor([[-1.0, -1.0, -1.0], [0.5, 0.5, 25.0]])
    token_rows = torch.tensor([1, 1, 0], dtype=torch.int32)
    # softplus(-0.5) = 0.474 and softplus(25) = 25 are filtered, softplus(1) = 1.313 is kept, row 0 keeps everything
    expected[:2, 0] = expected[0, 2] = -math.inf
    filter_dt_reference(dt, dt_bias, dt_threshold, token_rows)
    torch.testing.assert_close(dt, expected, rtol=0, atol=0)
