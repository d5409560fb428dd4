"""Time selective_scan against vLLM's selective_scan_fn on one GPU, in one process.

    python benchmarks/scan_kernels.py [--out FOLDER]

Needs a CUDA build of vLLM. Medians after warm-up, with the caches flushed between runs; vLLM's inputs are laid out
as it wants them beforehand, so its layout copies are not counted. Every shape is first checked against float64.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from triton.testing import do_bench

sys.path.insert(0, str(Path(__file__).resolve().parent))

from support.environment import environment, environment_line
from support.h200 import BYTES_PER_US, EXPONENTIALS_PER_US

from vllm_longmamba.kernels import selective_scan, selective_scan_reference

D_STATE = 16
SHAPES = [(tokens, d_inner, nseq) for d_inner in (4096, 8192) for tokens in (2048, 8192, 65536) for nseq in (1, 4)]
# tokens of each sequence that are compared with float64, and the tolerance of bfloat16 outputs
CHECKED_TOKENS = 1024
MAX_ERROR = 3e-3


def scan_inputs(tokens: int, d_inner: int, nseq: int, is_filtered: bool) -> dict[str, torch.Tensor | None]:
    """Random arguments in the shapes and dtypes of Mamba-1.4B (A near -1..-16, dt of 0.001 to 0.1)."""
    generator = torch.Generator("cuda").manual_seed(tokens + d_inner + nseq)

    def random(kind: Callable[..., torch.Tensor], *shape: int) -> torch.Tensor:
        return kind(*shape, device="cuda", generator=generator)

    def bf16(*shape: int) -> torch.Tensor:
        return random(torch.randn, *shape).to(torch.bfloat16)

    projection = bf16(tokens, 128 + 2 * D_STATE)
    states = torch.arange(1.0, D_STATE + 1, device="cuda")
    int32 = {"dtype": torch.int32, "device": "cuda"}
    inputs = {
        "x": bf16(tokens, d_inner),
        "dt": bf16(tokens, d_inner) * 0.5,
        "A": -states * (1 + 0.1 * random(torch.rand, d_inner, D_STATE)),
        "B": projection[:, 128 : 128 + D_STATE],
        "C": projection[:, 128 + D_STATE :],
        "D": torch.ones(d_inner, device="cuda"),
        "z": bf16(tokens, 2 * d_inner)[:, d_inner:],
        "dt_bias": random(torch.rand, d_inner) * 4.6 - 6.9,
        "state": random(torch.randn, nseq + 1, d_inner, D_STATE),
        "query_start_loc": torch.arange(nseq + 1, **int32) * (tokens // nseq),
        "state_indices": torch.arange(1, nseq + 1, **int32),
        "has_initial_state": torch.ones(nseq, dtype=torch.bool, device="cuda"),
    }
    if is_filtered:
        # half of the channels are global, most of their tokens are filtered
        dt_threshold = torch.full((2, d_inner), -1.0, device="cuda")
        dt_threshold[1, ::2] = 0.02
        inputs |= {
            "dt_threshold": dt_threshold,
            "seq_rows": torch.ones(nseq, **int32),
            "seq_prompt_tokens": torch.full((nseq,), tokens // nseq, **int32),
        }
    return inputs


def first_tokens(inputs: dict[str, torch.Tensor | None], count: int) -> dict[str, torch.Tensor | None]:
    """The same arguments for the first tokens of the batch's first sequence."""
    cut = {name: inputs[name][:count] for name in ("x", "dt", "B", "C", "z")}
    cut["query_start_loc"] = torch.tensor([0, count], dtype=torch.int32, device="cuda")
    for name in ("state_indices", "has_initial_state", "seq_rows", "seq_prompt_tokens"):
        if name in inputs:
            cut[name] = inputs[name][:1]
    return inputs | cut


def check(inputs: dict[str, torch.Tensor | None]) -> float:
    """Relative error norm of the first sequence's first outputs against float64."""
    count = min(CHECKED_TOKENS, int(inputs["query_start_loc"][1]))
    exact = {
        name: tensor.double() if tensor.is_floating_point() else tensor
        for name, tensor in first_tokens(inputs, count).items()
    }
    expected = selective_scan_reference(**exact)
    out = selective_scan(**inputs | {"state": inputs["state"].clone()}, out=torch.full_like(inputs["x"], float("nan")))
    assert not out.isnan().any(), "selective_scan left outputs unwritten"
    error = ((out[:count] - expected).norm() / expected.norm()).item()
    assert error <= MAX_ERROR, f"relative error {error:.1e} against float64, more than {MAX_ERROR}"
    return error


def stock_scan(inputs: dict[str, torch.Tensor | None]) -> Callable[[], object]:
    """vLLM's scan of the same inputs, in its own layout; it overwrites its gate."""
    from vllm.model_executor.layers.mamba.ops.mamba_ssm import selective_scan_fn

    channels_major = {name: inputs[name].T.contiguous() for name in ("x", "dt", "B", "C", "z")}
    state = inputs["state"].clone()
    return lambda: selective_scan_fn(
        channels_major["x"], state, channels_major["dt"], inputs["A"], channels_major["B"], channels_major["C"],
        inputs["D"], channels_major["z"], inputs["dt_bias"], True, inputs["query_start_loc"],
        inputs["state_indices"], inputs["has_initial_state"],
    )  # fmt: skip


def median_ms(function: Callable[[], object]) -> float:
    return do_bench(function, warmup=20, rep=80, return_mode="median")


def measure(tokens: int, d_inner: int, nseq: int) -> dict[str, float]:
    """Times in milliseconds of one shape, after its check."""
    plain, filtered = (scan_inputs(tokens, d_inner, nseq, is_filtered) for is_filtered in (False, True))
    error, filtered_error = check(plain), check(filtered)
    out = torch.empty_like(plain["x"])
    # the caches of repeated runs would grow without bound; starting from zero they do not
    plain["has_initial_state"].zero_()
    filtered["has_initial_state"].zero_()
    # x, dt, z in, out: bfloat16
    floor_bytes = 8 * tokens * d_inner / BYTES_PER_US
    floor_exponentials = tokens * d_inner * D_STATE / EXPONENTIALS_PER_US
    result = {
        "tokens": tokens,
        "d_inner": d_inner,
        "sequences": nseq,
        "stock_ms": median_ms(stock_scan(plain)),
        "off_ms": median_ms(lambda: selective_scan(**plain, out=out)),
        "on_ms": median_ms(lambda: selective_scan(**filtered, out=out)),
        "floor_bytes_ms": 1e-3 * floor_bytes,
        "floor_exponentials_ms": 1e-3 * floor_exponentials,
        "error": error,
        "error_on": filtered_error,
    }
    return result | {
        "speedup": result["stock_ms"] / result["off_ms"],
        "speedup_on": result["stock_ms"] / result["on_ms"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    out = parser.parse_args().out
    print("tokens d_inner seqs | stock ms | off ms    x | on ms     x | ns/token | floors ms   | error")
    results = []
    for tokens, d_inner, nseq in SHAPES:
        r = measure(tokens, d_inner, nseq)
        results.append(r)
        print(
            f"{tokens:6} {d_inner:7} {nseq:4} | {r['stock_ms']:8.3f} | {r['off_ms']:6.3f} {r['speedup']:4.2f} "
            f"| {r['on_ms']:6.3f} {r['speedup_on']:4.2f} | {1e6 * r['on_ms'] / tokens:8.1f} "
            f"| {r['floor_bytes_ms']:.3f} {r['floor_exponentials_ms']:.3f} | {max(r['error'], r['error_on']):.1e}",
            flush=True,
        )
    document = {"environment": environment(), "results": results}
    out.mkdir(parents=True, exist_ok=True)
    (out / "scan_kernels.json").write_text(json.dumps(document, indent=1) + "\n")
    (out / "scan_kernels.md").write_text(markdown(document))


def markdown(document: dict[str, Any]) -> str:
    lines = [
        "# The Mamba-1 scan: vLLM's selective_scan_fn against selective_scan",
        "",
        environment_line(document["environment"]),
        "",
        "bfloat16, d_state 16, state float32. Medians with cold caches; vLLM's layout copies are not counted. Error: "
        "relative norm against float64.",
        "",
        "| tokens | d_inner | sequences | stock ms | off ms | x | on ms | x | bytes ms | exponentials ms | error |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in document["results"]:
        lines.append(
            f"| {r['tokens']} | {r['d_inner']} | {r['sequences']} | {r['stock_ms']:.3f} | {r['off_ms']:.3f} "
            f"| {r['speedup']:.2f} | {r['on_ms']:.3f} | {r['speedup_on']:.2f} | {r['floor_bytes_ms']:.3f} "
            f"| {r['floor_exponentials_ms']:.3f} | {max(r['error'], r['error_on']):.1e} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
