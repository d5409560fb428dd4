"""Plain forms of the kernels by which vLLM decodes draft tokens: on a CPU, vLLM's own go wrong with them."""

from typing import Any

import pytest
import torch

from vllm_longmamba.engine import config
from vllm_longmamba.layers.filtered_mixer import FilteredMixer

DRAFTS = 3
NGRAMS = {"method": "ngram", "num_speculative_tokens": DRAFTS, "prompt_lookup_max": 3, "prompt_lookup_min": 1}


def run_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a CPU decode drafts, which is refused there, and run the rest as a GPU does."""
    from vllm.model_executor.layers.mamba import mamba_mixer2

    monkeypatch.setattr(mamba_mixer2, "causal_conv1d_update", convolve)
    monkeypatch.setattr(mamba_mixer2, "selective_state_update", update_states)
    monkeypatch.setattr(FilteredMixer, "runs_own_kernels", lambda _: True)
    monkeypatch.setattr(config, "refuse_unsupported", lambda _: None)


def convolve(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    activation: str,
    conv_state_indices: torch.Tensor,
    num_accepted_tokens: torch.Tensor,
    query_start_loc: torch.Tensor,
    max_query_len: int,
) -> torch.Tensor:
    """vLLM's `causal_conv1d_update` with drafts: a slot holds the inputs before the last step's tokens, then those."""
    assert activation == "silu"
    width, out = weight.shape[1], torch.empty_like(x)
    for sequence, slot in enumerate(conv_state_indices[:, 0].tolist()):
        start, end = query_start_loc[sequence].item(), query_start_loc[sequence + 1].item()
        accepted = int(num_accepted_tokens[sequence]) - 1
        inputs = torch.cat([conv_state[slot, :, accepted : accepted + width - 1], x[start:end].T], 1)
        summed = torch.nn.functional.conv1d(inputs[None], weight[:, None], bias, groups=len(weight))
        out[start:end] = torch.nn.functional.silu(summed[0]).T
        conv_state[slot, :, : inputs.shape[1] - 1] = inputs[:, 1:]
    return out


def update_states(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    dt_bias: torch.Tensor,
    dt_softplus: bool,
    state_batch_indices: torch.Tensor,
    out: torch.Tensor,
    num_accepted_tokens: torch.Tensor,
    cu_seqlens: torch.Tensor,
    **_: Any,
) -> None:
    """vLLM's `selective_state_update` with drafts: a request's slots hold the states behind the last step's tokens."""
    assert dt_softplus
    heads = x.shape[1]
    dt = torch.nn.functional.softplus(dt + dt_bias)
    B, C = (part.repeat_interleave(heads // part.shape[1], 1) for part in (B, C))
    for sequence, slots in enumerate(state_batch_indices.tolist()):
        current = state[slots[int(num_accepted_tokens[sequence]) - 1]]
        for number, token in enumerate(range(int(cu_seqlens[sequence]), int(cu_seqlens[sequence + 1]))):
            written = (dt[token] * x[token])[:, :, None] * B[token][:, None]
            current = current * torch.exp(dt[token][:, :, None] * A) + written
            state[slots[number]] = current
            out[token] = (current * C[token][:, None]).sum(-1) + D * x[token]
