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
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from support.environment import environment, environment_line

from vllm_longmamba.kernels import PER_DECODE_TOKEN, compile_ahead
from vllm_longmamba.kernels import causal_conv1d_update_triton as conv_module
from vllm_longmamba.kernels import selective_state_update_triton as update_module

# H200: bytes/s measured by a copy, in bytes a microsecond
BYTES_PER_US = 4.3e6
CACHE_BYTES = 200e6
MOST_CALLS = 800
BATCHES = (1, 8, 64, 256, 512)


class Shape(NamedTuple):
    """Of a Mamba layer; headdim 0: Mamba-1."""

    d_inner: int
    d_state: int
    headdim: int = 0
    ngroups: int = 1


SHAPES = {
    "mamba2-1.3b": Shape(4096, 128, 64),
    "mamba-1.4b": Shape(4096, 16),
    "zamba2-1.2b": Shape(4096, 64, 64),
    "falcon-mamba-7b": Shape(8192, 16),
    "nemotron-h-8b": Shape(8192, 128, 64, 8),
}


class Case:
    """The arguments of a layer's decode kernels for one batch, in the layout that the mixers hand them over.

    Attributes:
        slots: (calls, batch): the slots of each call.
    """

    def __init__(self, shape: Shape, batch: int, state_dtype: torch.dtype) -> None:
        self.shape, self.batch = shape, batch
        d_inner, d_state, headdim, ngroups = shape
        self.nheads = d_inner // headdim if headdim else 1
        self.per_token = self.nheads if headdim else d_inner
        self.conv_channels = d_inner + 2 * ngroups * d_state if headdim else d_inner
        bf16 = {"dtype": torch.bfloat16, "device": "cuda"}
        conv_bytes = 6 * self.conv_channels
        page = conv_bytes + d_inner * d_state * state_dtype.itemsize
        pages = max(batch, int(CACHE_BYTES / page) // batch * batch)
        cache = torch.zeros(pages + 1, page, dtype=torch.uint8, device="cuda")
        self.conv_state = cache[:, :conv_bytes].view(torch.bfloat16).unflatten(1, (3, -1)).transpose(1, 2)
        self.state = cache[:, conv_bytes:].view(state_dtype).unflatten(1, (d_inner, d_state))
        order = torch.randperm(pages, device="cuda", dtype=torch.int32) + 1
        self.slots = order.view(-1, batch)[:MOST_CALLS].contiguous()
        projection = torch.randn(batch, d_inner + self.conv_channels + self.per_token, **bf16)
        self.z, self.x, dt = projection.split([d_inner, self.conv_channels, self.per_token], 1)
        # Mamba-1's dt comes out of a projection of its own
        self.dt = dt if headdim else dt.contiguous()
        self.convolved = torch.randn(batch, self.conv_channels, **bf16)
        wide = self.convolved if headdim else torch.randn(batch, 128 + 2 * d_state, **bf16)
        self.B, self.C = wide[:, -2 * ngroups * d_state :].chunk(2, 1)
        self.A = -torch.rand(self.per_token, *([] if headdim else [d_state]), device="cuda")
        self.D, self.dt_bias = torch.ones(2, self.per_token, device="cuda")
        self.weight, self.bias = torch.randn(self.conv_channels, 4, **bf16), torch.randn(self.conv_channels, **bf16)
        self.dt_threshold = torch.full((8, self.per_token), -1.0, device="cuda")
        self.token_rows = torch.zeros(batch, dtype=torch.int32, device="cuda")
        self.out = torch.empty(batch, d_inner, **bf16)

    def update_arguments(self, call: int) -> dict[str, Any]:
        return {
            "state": self.state, "x": self.convolved[:, : self.shape.d_inner], "dt": self.dt, "A": self.A, "B": self.B,
            "C": self.C, "D": self.D, "z": None if self.shape.headdim else self.z, "dt_bias": self.dt_bias,
            "state_indices": self.slots[call], "dt_threshold": self.dt_threshold, "token_rows": self.token_rows,
            "out": self.out,
        }  # fmt: skip

    def conv_arguments(self, call: int) -> dict[str, Any]:
        return {
            "x": self.x, "weight": self.weight, "bias": self.bias, "conv_state": self.conv_state,
            "state_indices": self.slots[call], "silu": True, "out": self.convolved,
        }  # fmt: skip

    def stock_update(self, call: int) -> None:
        from vllm.model_executor.layers.mamba.ops.mamba_ssm import selective_state_update

        _, d_state, headdim, ngroups = self.shape
        given = self.update_arguments(call)
        options = {"z": given["z"], "dt_softplus": True, "state_batch_indices": given["state_indices"]}
        names = ("state", "x", "dt", "A", "B", "C", "D", "dt_bias", "out")
        state, x, dt, A, B, C, D, dt_bias, out = (given[name] for name in names)
        if headdim:
            heads = (self.nheads, headdim)
            state, x, out = state.unflatten(1, heads), x.unflatten(1, heads), out.unflatten(1, heads)
            B, C = (tensor.unflatten(1, (ngroups, d_state)) for tensor in (B, C))
            A, dt = A[:, None, None].expand(*heads, d_state), dt[..., None].expand(-1, *heads)
            D, dt_bias = (tensor[:, None].expand(heads) for tensor in (D, dt_bias))
        selective_state_update(state, x, dt, A, B, C, D, dt_bias, out=out, **options)

    def stock_conv(self, call: int) -> None:
        from vllm.model_executor.layers.mamba.ops.causal_conv1d import causal_conv1d_update

        causal_conv1d_update(
            self.x, self.conv_state, self.weight, self.bias, "silu", conv_state_indices=self.slots[call, :, None]
        )

    def update(self, call: int, sizes: Any = None) -> None:
        update_module.selective_state_update_triton(**self.update_arguments(call), sizes=sizes)

    def conv(self, call: int, sizes: Any = None) -> None:
        conv_module.causal_conv1d_update_triton(**self.conv_arguments(call), sizes=sizes)

    def update_sizes(self) -> list[tuple[int, int]]:
        """Channels a program and warps: 4 to 64 numbers of the state a thread."""
        d_inner, d_state, headdim, _ = self.shape
        tried = itertools.product((4, 8, 16, 32, 64, 128, 256), (1, 2, 4))
        return [
            (channels, warps)
            for channels, warps in tried
            if channels <= (headdim or d_inner) and 8 <= channels * d_state // (32 * warps) <= 64
        ]

    def floor(self) -> float:
        """Microseconds that the states' bytes take, read and written."""
        return 2 * self.batch * self.state[0].numel() * self.state.element_size() / BYTES_PER_US

    def conv_floor(self) -> float:
        return 2 * 2 * (3 + 1) * self.batch * self.conv_channels / BYTES_PER_US


CONV_SIZES = [
    (1, 64, 1), (1, 128, 1), (1, 256, 2), (2, 128, 1), (4, 128, 1), (4, 256, 2), (8, 128, 1), (8, 128, 2), (8, 256, 4),
    (16, 128, 4),
]  # fmt: skip


def compile_all(shapes: list[str], dtypes: list[torch.dtype]) -> None:
    """Compile all variants in threads."""
    compile_ahead_module = sys.modules[compile_ahead.__module__]
    compile_ahead_module._MOST_THREADS = 32
    for name, dtype in itertools.product(shapes, dtypes):
        case = Case(SHAPES[name], 8, dtype)
        for call in compile_ahead_module.meta_calls(case.update_arguments(0), 8, PER_DECODE_TOKEN):
            for sizes in case.update_sizes():
                update_module.selective_state_update_triton(**call, sizes=sizes)
        for call in compile_ahead_module.meta_calls(case.conv_arguments(0), 8, PER_DECODE_TOKEN):
            for sizes in CONV_SIZES:
                conv_module.causal_conv1d_update_triton(**call, sizes=sizes)
    for future in list(compile_ahead_module._pending.values()):
        if future.exception() is not None:
            print(f"not compiled: {future.exception()!r}"[:300])
    compile_ahead_module._pending.clear()


def microseconds(run: Callable[[int], object], calls: int) -> float:
    """Of one call: the median of five replays of a graph of all of them."""
    run(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in range(calls):
            run(call)
    graph.replay()
    times = []
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / calls)
    return statistics.median(times)


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
        (given.out / "decode_kernels.json").write_text(json.dumps(document, indent=1) + "\n")
        (given.out / "decode_kernels.md").write_text(markdown(document))
    print(markdown(document) + launch_sizes(document["results"]))


if __name__ == "__main__":
    main()
