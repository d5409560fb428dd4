"""Try launch sizes of the kernels: python benchmarks/support/launch_sizes.py [scan] [walk] [conv]

Prints microseconds (medians), vLLM's kernel first. The best sizes are constants of the
kernels' modules. decode_sizes.py tries those of decode.
"""

# ruff: noqa: B023
# The functions made in a loop are called within their iteration.

import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from triton.testing import do_bench

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scan_kernels import scan_inputs, stock_scan

from support.h200 import BYTES_PER_US
from vllm_longmamba.kernels import causal_conv1d, causal_conv1d_triton, selective_scan, selective_scan_triton


def microseconds(function: Callable[[], Any]) -> float:
    return 1e3 * do_bench(function, warmup=10, rep=40, return_mode="median")


SHARD, SHARDS = (int(part) for part in os.environ.get("SHARD", "0/1").split("/"))
COUNTER = itertools.count()


def is_mine() -> bool:
    """False for the variants of other processes, where several fill Triton's cache together (SHARD=0/8 ...)."""
    return next(COUNTER) % SHARDS == SHARD


def with_constants(module: Any, function: Callable[[], Any], **constants: Any) -> float:
    if not is_mine():
        return float("nan")
    before = {name: getattr(module, name) for name in constants}
    for name, value in constants.items():
        setattr(module, name, value)
    try:
        return microseconds(function)
    except Exception as error:
        print(f"  {constants}: {error!r}"[:200])
        return float("nan")
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def scan() -> None:
    module = selective_scan_triton
    variants = [
        {},
        {"supports_dependent_launch": lambda device: False},
        {"MAX_REGISTERS": 112},
        {"POLYNOMIALS": 0},
        {"POLYNOMIALS": 3},
        {"GROUP": 2},
        {"NUM_WARPS": 2, "BLOCK_CHANNELS": 128},
    ]
    for tokens in (8192, 65536) if SHARDS == 1 else (8192,):
        inputs = scan_inputs(tokens, 4096, 1, True)
        inputs["has_initial_state"].zero_()
        out = torch.empty_like(inputs["x"])
        print(f"scan {tokens}: stock {microseconds(stock_scan(inputs)):.0f}")
        for variant in variants:
            print(f"  {variant}: {with_constants(module, lambda: selective_scan(**inputs, out=out), **variant):.1f}")
        for chunk in (64, 128, 256, 512):
            sizes = {"SMALLEST_CHUNK": chunk, "LARGEST_CHUNK": chunk}
            print(f"  chunk {chunk}: {with_constants(module, lambda: selective_scan(**inputs, out=out), **sizes):.1f}")
        if SHARDS == 1:
            kernels(lambda: selective_scan(**inputs, out=out))


def kernels(function: Callable[[], Any]) -> None:
    function()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(10):
            function()
        torch.cuda.synchronize()
    for event in profile.key_averages():
        print(f"    {event.self_device_time_total / 10:8.1f} us {event.count // 10} x {event.key[:60]}")


def walk() -> None:
    for tokens, chunk in ((8192, 128), (65536, 256)):
        inputs = scan_inputs(tokens, 4096, 1, True)
        out = torch.empty_like(inputs["x"])
        for states, ahead in ((1, 16), (2, 8), (2, 16), (4, 8), (4, 16), (1, 32)):
            if not is_mine():
                continue
            selective_scan_triton.WALK_STATES, selective_scan_triton.WALK_AHEAD = states, ahead
            selective_scan(**inputs, out=out)
            print(f"walk {tokens} / {chunk}: {states} states, {ahead} ahead")
            kernels(lambda: selective_scan(**inputs, out=out))
    selective_scan_triton.WALK_STATES, selective_scan_triton.WALK_AHEAD = 2, 16


def conv() -> None:
    from vllm.model_executor.layers.mamba.ops.causal_conv1d import causal_conv1d_fn
    from vllm.v1.attention.backends.utils import compute_causal_conv1d_metadata

    int32 = {"dtype": torch.int32, "device": "cuda"}
    for tokens, channels, pitch in ((8192, 4096, 8192), (65536, 4096, 8192), (16384, 4352, 8512)):
        x = torch.randn(tokens, pitch, device="cuda", dtype=torch.bfloat16)[:, pitch - channels - 64 : pitch - 64]
        weight, bias = (
            torch.randn(channels, 4, device="cuda").bfloat16(),
            torch.randn(channels, device="cuda").bfloat16(),
        )
        state = torch.randn(3, 3, channels, device="cuda").bfloat16().transpose(1, 2)
        starts, slots = torch.tensor([0, tokens], **int32), torch.ones(1, **int32)
        initial = torch.ones(1, device="cuda", dtype=torch.bool)

        class Metadata:
            nums_dict, batch_ptr, token_chunk_offset_ptr = compute_causal_conv1d_metadata(
                starts.cpu(), device=torch.device("cuda")
            )

        stock = microseconds(
            lambda: causal_conv1d_fn(
                x.T,
                weight,
                bias,
                state,
                starts,
                slots,
                initial,
                "silu",
                metadata=Metadata,
            )
        )
        floor = 4 * tokens * channels / BYTES_PER_US
        print(f"conv {tokens} x {channels}: stock {stock:.1f}, bytes {floor:.1f}")
        for part, wide, group, warps in (
            (16, 128, 4, 1), (16, 128, 8, 1), (16, 128, 16, 1), (16, 256, 8, 2), (32, 128, 4, 1), (32, 128, 8, 1),
            (32, 256, 8, 1), (32, 512, 4, 2), (64, 128, 4, 1), (64, 256, 4, 1), (128, 128, 4, 1),
        ):  # fmt: skip
            sizes = {"PART": part, "LARGEST_BLOCK": wide, "GROUP": group, "NUM_WARPS": warps}
            run = lambda: causal_conv1d(x, weight, bias, state, starts, slots, initial)  # noqa: E731
            print(
                f"  {part} x {wide} by {group}, {warps} warps: {with_constants(causal_conv1d_triton, run, **sizes):.1f}"
            )


if __name__ == "__main__":
    for name in sys.argv[1:] or ["scan", "walk", "conv"]:
        {"scan": scan, "walk": walk, "conv": conv}[name]()
