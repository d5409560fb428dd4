"""Time the kernels of a decode step on one GPU, beside vLLM's, and try their launch sizes.

    python benchmarks/decode_kernels.py [--shapes NAME ...] [--seconds 170] [--out FOLDER]

Needs a CUDA build of vLLM. Calls run in CUDA graphs, one after the other on different slots of a cache that is larger
than the GPU's own (pages as in vLLM: convolution's and SSM's state of a slot side by side), so that every state comes
from memory, as in a model with many layers. Writes decode_kernels.json and .md, and prints the table of launch sizes
for kernels/selective_state_update_triton.py and kernels/causal_conv1d_update_triton.py.
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from support.compile_together import compile_together
from support.decode_case import SHAPES, Case, conv_module, update_module
from support.environment import environment, environment_line
from support.graph_timing import microseconds

from vllm_longmamba.kernels import PER_DECODE_TOKEN
from vllm_longmamba.kernels.compile_ahead import meta_calls

BATCHES = (1, 4, 16, 64, 256, 512)
CONV_SIZES = [
    (1, 64, 1), (1, 128, 1), (1, 256, 2), (2, 128, 1), (4, 128, 1), (4, 256, 2), (8, 128, 1), (8, 128, 2), (8, 256, 4),
    (16, 128, 4),
]  # fmt: skip
# of an update that projects dt itself, and the batches for which that may pay
PROJECTION_SIZES = [(8, 2), (16, 2), (16, 4), (32, 4), (32, 8)]
PROJECTED_BATCHES = (1, 2, 4, 8, 16)


def compile_all(shapes: list[str], dtypes: list[torch.dtype]) -> None:
    """Compile all variants in threads."""
    with compile_together():
        for name, dtype in itertools.product(shapes, dtypes):
            case = Case(SHAPES[name], 8, dtype)
            for call in meta_calls(case.update_arguments(0), 8, PER_DECODE_TOKEN):
                for sizes in case.update_sizes():
                    update_module.selective_state_update_triton(**call, sizes=sizes)
                if case.rank:
                    given = call | {"dt": case.low_rank_dt.to("meta"), "dt_weight": case.dt_weight.to("meta")}
                    for sizes in PROJECTION_SIZES:
                        update_module.selective_state_update_triton(**given, sizes=sizes)
            for call in meta_calls(case.conv_arguments(0), 8, PER_DECODE_TOKEN):
                for sizes in CONV_SIZES:
                    conv_module.causal_conv1d_update_triton(**call, sizes=sizes)


def measure(case: Case, without_pdl: bool) -> dict[str, Any]:
    """Microseconds of a call; `pair`: convolution and state update, as they follow each other in a layer."""
    calls = len(case.slots)
    updates = {sizes: microseconds(lambda call, s=sizes: case.update(call, s), calls) for sizes in case.update_sizes()}
    convs = {sizes: microseconds(lambda call, s=sizes: case.conv(call, s), calls) for sizes in CONV_SIZES}
    best_update, best_conv = min(updates, key=updates.__getitem__), min(convs, key=convs.__getitem__)

    def pair(conv: Callable[[int], object], update: Callable[[int], object]) -> float:
        return microseconds(lambda call: (conv(call), update(call)), calls)

    def ours(call: int) -> None:
        case.update(call, best_update)

    result = {
        "update": {"bytes": case.floor(), "stock": microseconds(case.stock_update, calls), "now": 0.0, "best": 0.0},
        "conv": {"bytes": case.conv_floor(), "stock": microseconds(case.stock_conv, calls), "now": 0.0, "best": 0.0},
        "best_update": best_update, "best_conv": best_conv,
        "updates": {f"{a}/{b}": round(time, 2) for (a, b), time in sorted(updates.items(), key=lambda one: one[1])},
        "convs": {f"{a}x{b}/{c}": round(time, 2) for (a, b, c), time in sorted(convs.items(), key=lambda one: one[1])},
    }  # fmt: skip
    result["update"] |= {"now": microseconds(case.update, calls), "best": updates[best_update]}
    result["conv"] |= {"now": microseconds(case.conv, calls), "best": convs[best_conv]}
    result["pair"] = {
        "bytes": case.floor() + case.conv_floor(),
        "stock": pair(case.stock_conv, case.stock_update),
        "stock_conv": pair(case.stock_conv, ours),
        "best": pair(lambda call: case.conv(call, best_conv), ours),
    }
    if case.rank and case.batch in PROJECTED_BATCHES:
        times = {f"{a}/{b}": microseconds(lambda call, s=(a, b): case.update_with_projection(call, s), calls)
                 for a, b in PROJECTION_SIZES}  # fmt: skip
        apart = microseconds(lambda call: case.project_and_update(call, best_update), calls)
        result["dt_proj"] = {"apart": apart, "together": times}
    if not without_pdl:
        return result
    has_dependent_launch = update_module.supports_dependent_launch
    try:
        for module in (update_module, conv_module):
            module.supports_dependent_launch = lambda device: False
        result["pair"]["no_pdl"] = pair(lambda call: case.conv(call, best_conv), ours)
    finally:
        for module in (update_module, conv_module):
            module.supports_dependent_launch = has_dependent_launch
    return result


def markdown(document: dict[str, Any]) -> str:
    lines = [
        "# A layer's decode kernels: vLLM's against ours, microseconds",
        "",
        environment_line(document["environment"]),
        "",
        "State update and convolution update alone, then both in a row (`pair`). `now`: with the launch sizes of the "
        "kernel's file; `best`: of all tried. `stock conv`: vLLM's convolution in front of our update. `no PDL`: "
        "without programmatic dependent launch.",
        "",
        "| shape, state, batch | update: bytes, stock | now | best | conv: bytes, stock | now | best "
        "| pair: stock | stock conv | ours | no PDL |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in document["results"]:
        update, conv, pair = r["update"], r["conv"], r["pair"]
        lines.append(
            f"| {r['shape']}, {r['state']}, {r['batch']} | {update['bytes']:.1f}, {update['stock']:.2f} "
            f"| {update['now']:.2f} | {update['best']:.2f} ({'/'.join(map(str, r['best_update']))}) "
            f"| {conv['bytes']:.1f}, {conv['stock']:.2f} | {conv['now']:.2f} "
            f"| {conv['best']:.2f} ({'/'.join(map(str, r['best_conv']))}) "
            f"| {pair['stock']:.2f} | {pair['stock_conv']:.2f} | {pair['best']:.2f} "
            f"| {pair.get('no_pdl', float('nan')):.2f} |"
        )
    return "\n".join(lines) + "\n"


def launch_sizes(results: list[dict[str, Any]]) -> str:
    """LAUNCH_SIZES of the state update's file, with the best of each case; equal neighbours are one."""
    table: dict[tuple[int, int], list[tuple[int, tuple[int, int]]]] = {}
    for r in results:
        shape, itemsize = SHAPES[r["shape"]], getattr(torch, r["state"]).itemsize
        table.setdefault((itemsize, shape.d_state), []).append((r["batch"] * shape.d_inner, r["best_update"]))
    lines = []
    for key, entries in table.items():
        entries.sort()
        kept = [one for one, after in itertools.pairwise([*entries, (0, None)]) if one[1] != after[1]]
        lines.append(f"    {key}: {tuple(kept)},")
    return "\n".join(["LAUNCH_SIZES = {", *lines, "}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES)[:4])
    parser.add_argument(
        "--states", nargs="+", choices=["bfloat16", "float16", "float32"], default=["bfloat16", "float32"]
    )
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--seconds", type=float, default=170.0, help="after which nothing new is begun")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    given = parser.parse_args()
    end = time.monotonic() + given.seconds
    given.out.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    compile_all(given.shapes, [getattr(torch, state) for state in given.states])
    print(f"compiled in {time.monotonic() - begin:.0f} s", flush=True)
    document: dict[str, Any] = {"environment": environment(), "results": []}
    for state, name, batch in itertools.product(given.states, given.shapes, given.batches):
        if time.monotonic() > end:
            print("time is up")
            break
        # compiled when it is run, so only where it is of most interest
        without_pdl = state == given.states[0] and batch in (1, 64, 256)
        result = measure(Case(SHAPES[name], batch, getattr(torch, state)), without_pdl)
        document["results"].append({"shape": name, "state": state, "batch": batch, **result})
        print(markdown({**document, "results": document["results"][-1:]}).splitlines()[-1], flush=True)
        print(f"    update {result['updates']}\n    conv {result['convs']}", flush=True)
        if "dt_proj" in result:
            print(f"    dt_proj {result['dt_proj']}", flush=True)
        (given.out / "decode_kernels.json").write_text(json.dumps(document, indent=1) + "\n")
        (given.out / "decode_kernels.md").write_text(markdown(document))
    print(markdown(document) + launch_sizes(document["results"]))


if __name__ == "__main__":
    main()
