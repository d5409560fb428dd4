"""Time ssd against vLLM's mamba_chunk_scan_combined_varlen on one GPU, in one process.

    python benchmarks/ssd_kernels.py [--out FOLDER]

Needs a CUDA build of vLLM. Medians after warm-up, with the caches flushed between runs. vLLM's call has a raw dt of
-inf where the filter drops a token, and what the mixer does around it: the initial states are read out of the cache
before, the last ones written to it after. Both shapes are first checked against float64. support/ssd_sizes.py tries
launch sizes.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from triton.testing import do_bench

sys.path.insert(0, str(Path(__file__).resolve().parent))


from support.environment import environment, environment_line
from support.h200 import BYTES_PER_US

from vllm_longmamba.kernels import ssd, ssd_reference

# nheads, headdim, d_state
SHAPES = {"mamba2-1.3b": (64, 64, 128), "zamba2-1.2b": (64, 64, 64)}
BATCHES = [(tokens, nseq) for tokens in (2048, 8192, 65536) for nseq in (1, 4)] + [(262144, 32)]
CHUNK_SIZE = 256
CHECKED_TOKENS = 300
MAX_ERROR = 3e-3
# H200: bf16 operations/s measured by a matrix product
OPERATIONS_PER_SECOND = 7.8e14


def ssd_inputs(shape: str, tokens: int, nseq: int, is_filtered: bool, dtype: torch.dtype = torch.bfloat16) -> dict:
    """Random arguments in the shapes and dtypes of the model: dt of 0.001 to 0.1, A of -1 to -16, one group."""
    nheads, headdim, d_state = SHAPES[shape]
    generator = torch.Generator("cuda").manual_seed(tokens + nseq)

    def random(kind: Callable[..., torch.Tensor], *size: int) -> torch.Tensor:
        return kind(*size, device="cuda", generator=generator)

    sizes = [nheads * headdim, d_state, d_state]
    x, B, C = random(torch.randn, tokens, sum(sizes)).to(dtype).split(sizes, dim=1)
    int32 = {"dtype": torch.int32, "device": "cuda"}
    inputs = {
        "x": x.unflatten(1, (nheads, headdim)),
        "dt": (random(torch.randn, tokens, 2 * nheads) * 0.5).to(dtype)[:, :nheads],
        "A": -1.0 - 15.0 * random(torch.rand, nheads),
        "B": B.unflatten(1, (1, d_state)),
        "C": C.unflatten(1, (1, d_state)),
        "D": torch.ones(nheads, device="cuda"),
        "dt_bias": random(torch.rand, nheads) * 4.6 - 6.9,
        "state": random(torch.randn, nseq + 1, nheads, headdim, d_state),
        "query_start_loc": torch.arange(nseq + 1, **int32) * (tokens // nseq),
        "state_indices": torch.arange(1, nseq + 1, **int32),
        "has_initial_state": torch.ones(nseq, dtype=torch.bool, device="cuda"),
    }
    if is_filtered:
        # 35 % of the heads are global; 90 % of their tokens are filtered
        softplus_dt = torch.nn.functional.softplus(inputs["dt"].float() + inputs["dt_bias"])
        dt_threshold = torch.full((2, nheads), -1.0, device="cuda")
        # no threshold is a dt itself: those are few and compare differently in float64
        dt_threshold[1] = softplus_dt[:4096].quantile(0.9, dim=0) * 1.0001
        dt_threshold[1, random(torch.rand, nheads) > 0.35] = -1.0
        inputs |= {
            "dt_threshold": dt_threshold,
            "seq_rows": torch.ones(nseq, **int32),
            "seq_prompt_tokens": torch.full((nseq,), tokens // nseq, **int32),
        }
    return inputs


def stock_ssd(inputs: dict, out: torch.Tensor) -> Callable[[], object]:
    """vLLM's kernels on the same inputs, as its mixer calls them."""
    from vllm.model_executor.layers.mamba.ops.ssd_combined import mamba_chunk_scan_combined_varlen

    starts, dt, state = inputs["query_start_loc"].tolist(), inputs["dt"].clone(), inputs["state"]
    if "dt_threshold" in inputs:
        is_filtered = torch.nn.functional.softplus(dt.float() + inputs["dt_bias"]) <= inputs["dt_threshold"][1]
        dt[is_filtered] = float("-inf")
    chunks, sequences, last = [0], [], []
    for sequence, (start, end) in enumerate(itertools.pairwise(starts)):
        for first in range(start, end, CHUNK_SIZE):
            chunks.append(min(first + CHUNK_SIZE, end))
            sequences.append(sequence)
        last.append(len(sequences) - 1)
    int32 = {"dtype": torch.int32, "device": "cuda"}
    metadata = {
        "cu_seqlens": inputs["query_start_loc"],
        "cu_chunk_seqlens": torch.tensor(chunks, **int32),
        "last_chunk_indices": torch.tensor(last, **int32),
        "seq_idx": torch.tensor(sequences, **int32),
    }
    slots, is_initial = inputs["state_indices"], inputs["has_initial_state"][:, None, None, None]

    def run() -> None:
        initial = torch.where(is_initial, state[slots], 0)
        state[slots] = mamba_chunk_scan_combined_varlen(
            inputs["x"], dt, inputs["A"], inputs["B"], inputs["C"], CHUNK_SIZE, D=inputs["D"],
            dt_bias=inputs["dt_bias"], initial_states=initial, dt_softplus=True, out=out, state_dtype=state.dtype,
            **metadata,
        )  # fmt: skip

    return run


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def with_own_state(inputs: dict) -> dict:
    return inputs | {"state": inputs["state"].clone()}


def check_small(shape: str, dtype: torch.dtype, run: Callable[..., object] = ssd) -> tuple[float, float]:
    """Relative error norms of outputs and states of two short sequences against float64."""
    inputs = ssd_inputs(shape, 2 * CHECKED_TOKENS, 2, True, dtype)
    # some heads beyond what the factored kernel takes
    inputs["A"][::9] *= 40.0
    exact = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
    expected = ssd_reference(**exact)
    out = torch.full_like(inputs["x"], float("nan"))
    given = with_own_state(inputs)
    run(**given, out=out)
    return relative_error(out, expected), relative_error(given["state"][1:], exact["state"][1:])


def check_large(inputs: dict) -> dict[str, float]:
    """Relative differences of outputs and states from vLLM's, on the measured shape."""
    ours, stock = with_own_state(inputs), with_own_state(inputs)
    out, stock_out = (torch.full_like(inputs["x"], float("nan")) for _ in range(2))
    ssd(**ours, out=out)
    stock_ssd(stock, stock_out)()
    return {
        "output_difference": relative_error(out, stock_out),
        "state_difference": relative_error(ours["state"][1:], stock["state"][1:]),
    }


def median_ms(function: Callable[[], object]) -> float:
    return do_bench(function, warmup=20, rep=60, return_mode="median")


def kernel_times(function: Callable[[], object], count: int = 5) -> dict[str, float]:
    """Microseconds of each kernel of one call, by the profiler."""
    function()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(count):
            function()
        torch.cuda.synchronize()
    times: dict[str, float] = {}
    for event in profile.key_averages():
        if event.self_device_time_total > 0:
            name = event.key[:40].strip("_").removesuffix("_kernel")
            times[name] = round(times.get(name, 0.0) + event.self_device_time_total / count, 1)
    return times


def measure(shape: str, tokens: int, nseq: int) -> dict[str, Any]:
    """Times in milliseconds of one shape, after its check."""
    plain, filtered = (ssd_inputs(shape, tokens, nseq, is_filtered) for is_filtered in (False, True))
    difference = check_large(filtered)
    # the caches of repeated runs would grow without bound; starting from zero they do not
    plain["has_initial_state"].zero_()
    filtered["has_initial_state"].zero_()
    out = torch.empty_like(plain["x"])
    nheads, headdim, d_state = SHAPES[shape]
    # x in, out
    floor_bytes = 4 * tokens * nheads * headdim / BYTES_PER_US
    # state, its product with C, half a block of 64
    floor_operations = tokens * nheads * headdim * (4 * d_state + 64) / OPERATIONS_PER_SECOND
    result = {
        "shape": shape,
        "tokens": tokens,
        "sequences": nseq,
        "stock_ms": median_ms(stock_ssd(plain, out)),
        "off_ms": median_ms(lambda: ssd(**plain, out=out)),
        "on_ms": median_ms(lambda: ssd(**filtered, out=out)),
        "floor_bytes_ms": 1e-3 * floor_bytes,
        "floor_operations_ms": 1e3 * floor_operations,
        **difference,
    }
    if nseq == 1:
        result["stock_kernels_us"] = kernel_times(stock_ssd(filtered, out))
        result["kernels_us"] = kernel_times(lambda: ssd(**filtered, out=out))
    return result | {
        "speedup": result["stock_ms"] / result["off_ms"],
        "speedup_on": result["stock_ms"] / result["on_ms"],
    }


def check_all() -> bool:
    """Compare both shapes and both types with float64; whether all are within their limits."""
    is_exact = True
    for shape in SHAPES:
        for dtype, limit in ((torch.bfloat16, MAX_ERROR), (torch.float32, 1e-4)):
            errors = check_small(shape, dtype)
            verdict = "" if max(errors) <= limit else f": MORE THAN {limit}"
            print(f"{shape} {dtype}: error of outputs {errors[0]:.1e}, of states {errors[1]:.1e}{verdict}", flush=True)
            is_exact = is_exact and not verdict
    return is_exact


def compare(out: Path) -> None:
    is_exact = check_all()
    print("shape tokens seqs | stock ms | off ms    x | on ms     x | ns/token | floors ms   | differences")
    results = []
    for shape, (tokens, nseq) in itertools.product(SHAPES, BATCHES):
        r = measure(shape, tokens, nseq)
        results.append(r)
        print(
            f"{shape} {tokens:6} {nseq:3} | {r['stock_ms']:8.3f} | {r['off_ms']:6.3f} {r['speedup']:4.2f} "
            f"| {r['on_ms']:6.3f} {r['speedup_on']:4.2f} | {1e6 * r['on_ms'] / tokens:8.1f} "
            f"| {r['floor_bytes_ms']:.3f} {r['floor_operations_ms']:.3f} "
            f"| {r['output_difference']:.1e} {r['state_difference']:.1e}",
            flush=True,
        )
        for name in ("stock_kernels_us", "kernels_us"):
            if name in r:
                print(f"    {name}: {sum(r[name].values()):.1f} = {r[name]}", flush=True)
    document = {"environment": environment(), "results": results}
    out.mkdir(parents=True, exist_ok=True)
    (out / "ssd_kernels.json").write_text(json.dumps(document, indent=1) + "\n")
    (out / "ssd_kernels.md").write_text(markdown(document))
    if not is_exact:
        sys.exit("ssd is further from float64 than allowed")


def markdown(document: dict[str, Any]) -> str:
    lines = [
        "# Mamba-2 prefill: vLLM's mamba_chunk_scan_combined_varlen against ssd",
        "",
        environment_line(document["environment"]),
        "",
        "bfloat16, state float32. Medians with cold caches. Differences: relative norm of ours against vLLM's outputs "
        "and states, filter on.",
        "",
        "| shape | tokens | sequences | stock ms | off ms | x | on ms | x | bytes ms | operations ms | differences |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in document["results"]:
        lines.append(
            f"| {r['shape']} | {r['tokens']} | {r['sequences']} | {r['stock_ms']:.3f} | {r['off_ms']:.3f} "
            f"| {r['speedup']:.2f} | {r['on_ms']:.3f} | {r['speedup_on']:.2f} | {r['floor_bytes_ms']:.3f} "
            f"| {r['floor_operations_ms']:.3f} | {r['output_difference']:.1e}, {r['state_difference']:.1e} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    compare(parser.parse_args().out)


if __name__ == "__main__":
    main()
