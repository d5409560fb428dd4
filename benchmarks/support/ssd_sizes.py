"""Try launch sizes of ssd: python benchmarks/support/ssd_sizes.py [--seconds 150] [--out FOLDER]

Prints microseconds of each kernel, by the profiler, for each variant until the seconds are up; vLLM's kernels first.
The best sizes are constants of kernels/ssd_triton.py.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ssd_kernels import kernel_times, median_ms, relative_error, ssd_inputs, stock_ssd, with_own_state

from support.environment import environment
from vllm_longmamba.kernels.ssd_triton import Sizes, ssd_triton


def variants() -> list[dict[str, Any]]:
    """Launch sizes to try, the most promising first; what is not named stays as it is."""
    found: list[dict[str, Any]] = [{}]
    for block, heads, warps, stages, registers in (
        (32, 1, 4, 3, 168), (32, 1, 4, 2, 168), (32, 1, 4, 4, 168), (32, 1, 4, 3, 128), (32, 1, 4, 3, None),
        (64, 1, 4, 2, None), (64, 1, 4, 2, 168), (64, 1, 4, 3, None), (64, 1, 4, 1, 168),
        (64, 2, 8, 2, None), (64, 2, 8, 3, None), (32, 2, 8, 3, None), (32, 2, 8, 3, 128), (32, 2, 8, 4, 128),
        (32, 4, 16, 3, 128), (16, 1, 4, 4, 128), (128, 1, 4, 2, None),
    ):  # fmt: skip
        names = ("block", "scan_heads", "scan_warps", "scan_stages", "scan_registers")
        found.append(dict(zip(names, (block, heads, warps, stages, registers), strict=True)))
    for block, stages, registers in ((32, 3, 168), (32, 2, None), (64, 2, None)):
        found.append({"is_factored": False, "block": block, "scan_stages": stages, "scan_registers": registers})
    for block, heads, warps, stages in (
        (32, 1, 4, 3), (32, 1, 4, 4), (32, 2, 8, 4), (64, 1, 4, 2), (64, 1, 4, 3), (64, 1, 4, 4), (64, 2, 8, 3),
        (64, 2, 4, 3),
    ):  # fmt: skip
        found.append({"block": block, "state_heads": heads, "state_warps": warps, "state_stages": stages})
    return found + segments()


def segments() -> list[dict[str, Any]]:
    return [{"segment": segment} for segment in (256, 512, 1024, 2048, 4096)]


def sweep(seconds: float, out: Path) -> None:
    """Prints the time of each kernel by launch sizes, until the seconds are up."""
    end = time.monotonic() + seconds
    results = []
    for shape, tokens, tried in (
        ("mamba2-1.3b", 16384, variants()),
        ("mamba2-1.3b", 8192, segments()),
        ("mamba2-1.3b", 65536, segments()),
        ("zamba2-1.2b", 16384, variants()[:12]),
    ):
        results += sweep_shape(shape, tokens, tried, end)
    out.mkdir(parents=True, exist_ok=True)
    (out / "ssd_sweep.json").write_text(json.dumps({"environment": environment(), "results": results}, indent=1) + "\n")


def sweep_shape(shape: str, tokens: int, tried: list[dict[str, Any]], end: float) -> list[dict[str, Any]]:
    inputs = ssd_inputs(shape, tokens, 1, False)
    stock_out, out = torch.empty_like(inputs["x"]), torch.empty_like(inputs["x"])
    unused = dict.fromkeys(("dt_threshold", "seq_rows", "seq_prompt_tokens"))
    stock_ssd(with_own_state(inputs), stock_out)()
    stock = stock_ssd(with_own_state(inputs), torch.empty_like(stock_out))
    times = kernel_times(stock)
    print(f"{shape} {tokens} stock: {1e3 * median_ms(stock):.1f} us, kernels {sum(times.values()):.1f} us {times}")
    results = []
    for variant in tried:
        if time.monotonic() > end:
            print("time is up")
            break
        given = with_own_state(inputs)
        sizes = Sizes()._replace(**variant)

        def run(given: dict = given, sizes: Any = sizes) -> None:
            ssd_triton(**given, **unused, out=out, sizes=sizes)

        started = time.monotonic()
        try:
            out.fill_(float("nan"))
            run()
            difference = relative_error(out, stock_out)
            given["has_initial_state"] = torch.zeros_like(given["has_initial_state"])
            times = kernel_times(run, 4)
        except Exception as error:
            print(f"{variant}: {error!r}"[:200], flush=True)
            continue
        taken = time.monotonic() - started
        print(
            f"{sum(times.values()):7.1f} us  {variant} difference {difference:.1e} {times} [{taken:.1f} s]", flush=True
        )
        result = {"shape": shape, "tokens": tokens, "variant": variant, "difference": difference, "kernels_us": times}
        results.append(result)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "results")
    parser.add_argument("--seconds", type=float, default=150.0)
    options = parser.parse_args()
    sweep(options.seconds, options.out)


if __name__ == "__main__":
    main()
