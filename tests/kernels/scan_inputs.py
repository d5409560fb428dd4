"""Random arguments for the kernels' tests, on the device under test."""

import os

import torch

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not IS_INTERPRETED else "cpu"
RUNS_TRITON = IS_INTERPRETED or DEVICE == "cuda"

# Relative error norm against float64 on the same rounded inputs.
TOLERANCES = {
    # float32 accumulation over at most a few hundred tokens, hardware exp2 and division on a GPU
    torch.float32: 2e-6,
    # the output is rounded to 8 bits: 2^-8 at most, about 1.7e-3 in the norm; the interpreter cuts bits off: twice that
    torch.bfloat16: 6e-3 if IS_INTERPRETED else 3e-3,
    # 11 bits: 2^-11 at most
    torch.float16: 4e-4,
}


def scan_inputs(
    lengths: tuple[int, ...],
    d_inner: int,
    d_state: int,
    dtype: torch.dtype = torch.float32,
    state_dtype: torch.dtype = torch.float32,
    is_filtered: bool = True,
    seed: int = 0,
) -> dict[str, torch.Tensor | None]:
    """Arguments of selective_scan: every second sequence starts from its slot, rows go round, 2 tokens are no prompt.

    B and C are slices of one projection, z of another, and the cache's slots lie further apart than they are long.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    tokens, nseq, rows = sum(lengths), len(lengths), 3
    projection = normal(tokens, 5 + 2 * d_state).to(dtype).to(DEVICE)
    gate = normal(tokens, 2 * d_inner).to(dtype).to(DEVICE)
    cache = normal(nseq + 2, d_inner * d_state + 7).to(state_dtype).to(DEVICE)
    dt_threshold = 0.3 * torch.rand(rows, d_inner, generator=generator)
    dt_threshold[0] = -1.0
    dt_threshold[:, ::3] = -1.0
    int32 = {"dtype": torch.int32, "device": DEVICE}
    inputs = {
        "x": normal(tokens, d_inner).to(dtype).to(DEVICE),
        "dt": (normal(tokens, d_inner) - 2.0).to(dtype).to(DEVICE),
        "A": (-4.0 * torch.rand(d_inner, d_state, generator=generator)).to(DEVICE),
        "B": projection[:, 5 : 5 + d_state],
        "C": projection[:, 5 + d_state :],
        "D": normal(d_inner).to(DEVICE),
        "z": gate[:, d_inner:],
        "dt_bias": normal(d_inner).to(DEVICE),
        "state": cache[:, : d_inner * d_state].unflatten(1, (d_inner, d_state)),
        "query_start_loc": torch.tensor([0, *torch.tensor(lengths).cumsum(0)], **int32),
        "state_indices": torch.arange(nseq, 0, -1, **int32),
        "has_initial_state": (torch.arange(nseq) % 2 == 0).to(DEVICE),
        "dt_threshold": dt_threshold.to(DEVICE),
        "seq_rows": (torch.arange(nseq, **int32) + 1) % rows,
        "seq_prompt_tokens": torch.tensor([max(0, length - 2) for length in lengths], **int32),
    }
    if not is_filtered:
        inputs |= {"dt_threshold": None, "seq_rows": None, "seq_prompt_tokens": None}
    return inputs


def in_float64(inputs: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor | None]:
    """The same arguments in float64 with a cache of their own; thresholds stay as they are."""
    return {
        name: tensor.double() if tensor is not None and tensor.is_floating_point() else tensor
        for name, tensor in inputs.items()
    }


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what was expected."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def conv_update_inputs(
    batch: int, channels: int = 20, width: int = 4, dtype: torch.dtype = torch.float32, has_bias: bool = True,
    is_dim_first: bool = False,
) -> dict[str, torch.Tensor | None]:  # fmt: skip
    """Arguments of causal_conv1d_update.

    x is a slice of a projection, slots run backwards in a column of a table, and lie further apart than needed.
    """
    generator = torch.Generator().manual_seed(batch + channels)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)

    window = (channels, width - 1) if is_dim_first else (width - 1, channels)
    state = normal(batch + 2, channels * (width - 1) + 7)[:, 7:].unflatten(1, window)
    slots = torch.arange(batch, 0, -1, dtype=torch.int32, device=DEVICE)
    return {
        "x": normal(batch, channels + 9)[:, 3 : 3 + channels],
        "weight": normal(channels, width),
        "bias": normal(channels) if has_bias else None,
        # vLLM's layout: channels innermost
        "conv_state": state if is_dim_first else state.transpose(1, 2),
        "state_indices": torch.stack([slots, slots + 1], 1)[:, 0],
    }
