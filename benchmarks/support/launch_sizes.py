"""Try launch sizes of the kernels: python benchmarks/support/launch_sizes.py [scan] [walk] [conv] [update]

Prints microseconds (medians), vLLM's kernel first. The best sizes are constants of the kernels' modules.
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
from triton.testing import do_bench, do_bench_cudagraph

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scan_kernels import scan_inputs, stock_scan

from vllm_longmamba.kernels import causal_conv1d, causal_conv1d_triton, selective_scan, selective_scan_triton
from vllm_longmamba.kernels.selective_state_update_triton import selective_state_update_triton


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
        floor = 4 * tokens * channels / 4.3e6
        print(f"conv {tokens} x {channels}: stock {stock:.1f}, bytes {floor:.1f}")
        for block, wide, warps in (
            (8, 256, 4), (16, 128, 4), (16, 256, 4), (16, 256, 8), (32, 64, 2), (32, 128, 4), (32, 128, 8),
            (32, 256, 4), (32, 256, 8), (64, 64, 4), (64, 128, 4), (64, 128, 8), (128, 64, 4),
        ):  # fmt: skip
            sizes = {"BLOCK_TOKENS": block, "BLOCK_CHANNELS": wide, "NUM_WARPS": warps}
            run = lambda: causal_conv1d(x, weight, bias, state, starts, slots, initial)  # noqa: E731
            print(f"  {block} x {wide}, {warps} warps: {with_constants(causal_conv1d_triton, run, **sizes):.1f}")


def update() -> None:
    from vllm.model_executor.layers.mamba.ops.mamba_ssm import selective_state_update

    def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, device="cuda").to(dtype)

    shapes = {"mamba1": (1, 4096, 16), "falcon": (1, 8192, 16), "mamba2": (64, 64, 128), "zamba2": (64, 64, 64)}
    for (name, (nheads, headdim, d_state)), dtype, batch in itertools.product(
        shapes.items(), (torch.float32, torch.bfloat16), (1, 64, 256)
    ):
        d_inner, is_heads = nheads * headdim, nheads > 1
        steps = nheads if is_heads else d_inner
        state = torch.zeros(batch + 1, d_inner, d_state, device="cuda", dtype=dtype)
        x, z, dt, B, C = (random(batch, size) for size in (d_inner, d_inner, steps, d_state, d_state))
        A = -torch.rand(steps, *([] if is_heads else [d_state]), device="cuda")
        D, bias, slots = random(steps), random(steps), torch.arange(1, batch + 1, device="cuda", dtype=torch.int32)
        threshold, rows = torch.full((8, steps), -1.0, device="cuda"), torch.zeros_like(slots)
        out = torch.empty_like(x)
        if is_heads:
            wide = (A[:, None, None].expand(nheads, headdim, d_state), dt[..., None].expand(batch, nheads, headdim))
            heads = [tensor.view(batch, nheads, headdim) for tensor in (x, out)]
            column = [tensor[:, None].expand(nheads, headdim) for tensor in (D, bias)]
            stock_args = (
                state.unflatten(1, (nheads, headdim)),
                heads[0],
                wide[1],
                wide[0],
                B[:, None],
                C[:, None],
                *column,
            )
            stock_out, gate = heads[1], None
        else:
            stock_args, stock_out, gate = (state, x, dt, A, B, C, D, bias.float()), out, z
        stock = 1e3 * do_bench_cudagraph(
            lambda: selective_state_update(
                *stock_args,
                z=gate,
                dt_softplus=True,
                state_batch_indices=slots,
                out=stock_out,
            ),
            rep=20,
            return_mode="median",
        )
        floor = 2 * state[1:].numel() * state.element_size() / 4.3e6
        results = []
        for channels, warps in itertools.product((8, 16, 32, 64, 128, 256), (1, 2, 4)):
            if channels > headdim or not 8 <= channels * d_state // (32 * warps) <= 32 or not is_mine():
                continue
            arguments = (state, x, dt, A, B, C, D, gate, bias, slots, threshold, rows, out)
            run = lambda: selective_state_update_triton(*arguments, sizes=(channels, warps))  # noqa: E731
            results.append((1e3 * do_bench_cudagraph(run, rep=20, return_mode="median"), channels, warps))
        best = ", ".join(f"{channels}/{warps} {time:.2f}" for time, channels, warps in sorted(results)[:5])
        rest = ", ".join(f"{channels}/{warps} {time:.2f}" for time, channels, warps in sorted(results)[5:])
        print(f"update {name} {dtype} {batch}: stock {stock:.2f}, bytes {floor:.2f}; {best} | {rest}", flush=True)


if __name__ == "__main__":
    for name in sys.argv[1:] or ["scan", "walk", "conv", "update"]:
        {"scan": scan, "walk": walk, "conv": conv, "update": update}[name]()
