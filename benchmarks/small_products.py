"""Time the layers of a model's decode step for a few tokens, its products by cuBLAS and by `kernels.small_product`.

    python benchmarks/small_products.py [--shapes NAME ...] [--batches N ...] [--layers 48] [--out FOLDER]

Needs a CUDA build of vLLM and a GPU with programmatic dependent launch (compute capability 9.0). One CUDA graph has all
layers, with weights and states of their own, so that they come from memory. In front of Mamba-2's out_proj the kernel
also takes the gated norm, behind Mamba-1's in_proj the convolution. Checks its results, and writes small_products.json
and .md: microseconds of a layer, with every launch size of each product alone, then with the best of all.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from support.compile_together import compile_together
from support.decode_case import SHAPES, Case
from support.environment import environment, environment_line
from support.graph_timing import microseconds
from support.h200 import BYTES_PER_US

from vllm_longmamba.kernels import gated_norm, small_product_reference
from vllm_longmamba.kernels.compile_ahead import meta_calls
from vllm_longmamba.kernels.small_product_triton import small_product_triton

EPS = 1e-5
# (features a program, inputs in a block, warps, most blocks ahead)
Sizes = tuple[int, int, int, int]
SIZES: list[Sizes] = [
    (*block, ahead) for block in ((4, 512, 4), (4, 1024, 8), (8, 256, 4), (8, 512, 8)) for ahead in (1, 4, 8)
]


class Layers:
    """The layers of a model; each product by cuBLAS, or by a launch of the sizes given for it.

    Args:
        name: of a shape.
        batch: sequences.
        layers: how many have weights of their own.
    """

    def __init__(self, name: str, batch: int, layers: int) -> None:
        self.case, self.batch, self.layers = Case(SHAPES[name], batch), batch, layers
        case, bf16 = self.case, {"dtype": torch.bfloat16, "device": "cuda"}
        d_inner, d_model = case.shape.d_inner, case.shape.d_inner // 2
        shapes = {"in_proj": (case.projected.shape[1], d_model), "out_proj": (d_model, d_inner)}
        if case.rank:
            shapes["x_proj"] = (case.low_rank.shape[1], d_inner)
        self.weights = {
            product: [torch.randn(shape, **bf16) / shape[1] ** 0.5 for _ in range(layers)]
            for product, shape in shapes.items()
        }
        self.norm_weight = torch.ones(d_model, **bf16)
        self.gated_norm_weight = torch.ones(d_inner, **bf16)
        self.hidden, self.residual = torch.randn(2, batch, d_model, **bf16)
        self.normalized = torch.empty(batch, d_inner, **bf16)
        # What each product reads and writes.
        self.ends = {"in_proj": (self.hidden, case.projected), "out_proj": (case.out, self.hidden)}
        if case.rank:
            self.ends["x_proj"] = (case.convolved, case.low_rank)

    def floor(self) -> float:
        """Microseconds a layer that weights and states take from memory."""
        weights = sum(2 * of_layers[0].numel() for of_layers in self.weights.values())
        return weights / BYTES_PER_US + self.case.floor() + self.case.conv_floor()

    def time(self, sizes: Mapping[str, Sizes | None]) -> float:
        """Microseconds a layer."""
        return microseconds(lambda layer: self._run(layer, sizes), self.layers)

    def _run(self, layer: int, sizes: Mapping[str, Sizes | None]) -> None:
        from vllm import _custom_ops as ops

        ops.fused_add_rms_norm(self.hidden, self.residual, self.norm_weight, EPS)
        self._product("in_proj", layer, sizes)
        if not (self.case.rank and sizes.get("in_proj")):
            self.case.conv(layer)
        if self.case.rank:
            self._product("x_proj", layer, sizes)
            self.case.update_with_projection(layer)
        else:
            self.case.update(layer)
        self._product("out_proj", layer, sizes)

    def _product(self, name: str, layer: int, sizes: Mapping[str, Sizes | None]) -> None:
        weight, (x, out), gates = self.weights[name][layer], self.ends[name], self._gates(name)
        if sizes.get(name) is not None:
            small_product_triton(x, weight, *gates, EPS, out, self._convolution(name, layer), sizes[name])
            return
        if gates[0] is not None:
            x = gated_norm(self.case.out, *gates, EPS, self.normalized)
        torch.mm(x, weight.t(), out=out)

    def _gates(self, name: str) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Gate and weight of the norm in front of Mamba-2's out_proj; neither for other products."""
        is_normed = name == "out_proj" and not self.case.rank
        return (self.case.z, self.gated_norm_weight) if is_normed else (None, None)

    def _convolution(self, name: str, layer: int) -> tuple[Any, ...] | None:
        """That of Mamba-1, behind in_proj."""
        if name != "in_proj" or not self.case.rank:
            return None
        return self.case.weight, self.case.bias, self.case.conv_state, self.case.slots[layer], True

    def compile_all(self) -> None:
        """Compile every launch that is tried, in threads."""
        with compile_together():
            for name, sizes in itertools.product(self.ends, SIZES):
                gates, convolution = self._gates(name), self._convolution(name, 0)
                given = (*self.ends[name], self.weights[name][0], *gates, *(convolution or ()))
                # In their layout, for which kernels are compiled.
                [call] = meta_calls(dict(enumerate(given)), 1, ())
                x, out, weight, gate, norm_weight, *parts = call.values()
                small_product_triton(x, weight, gate, norm_weight, EPS, out, tuple(parts) or None, sizes)

    def largest_error(self, name: str, sizes: Sizes) -> float:
        """Of a product of random numbers against float32, as a share of the largest result."""
        weight, gates = self.weights[name][0], self._gates(name)
        x, out = (torch.randn_like(tensor) for tensor in self.ends[name])
        small_product_triton(x, weight, *gates, EPS, out, None, sizes)
        expected = small_product_reference(x.float(), weight, *gates, EPS)
        return float((out - expected).abs().max() / expected.abs().max())


def measure(layers: Layers) -> dict[str, Any]:
    """Microseconds a layer: each product alone by every launch size, then the best of all together."""
    now = layers.time({})
    alone: dict[str, dict[str, float]] = {}
    best: dict[str, Sizes | None] = {}
    for product in layers.weights:
        found = {}
        for sizes in SIZES:
            if (error := layers.largest_error(product, sizes)) > 0.02:
                raise RuntimeError(f"{product} with {sizes}: off by {error:.3f} of the largest result")
            found[sizes] = layers.time({product: sizes})
        alone[product] = {str(sizes): time for sizes, time in sorted(found.items(), key=lambda one: one[1])}
        fastest = min(found, key=found.__getitem__)
        best[product] = fastest if found[fastest] < now else None
    return {"bytes": layers.floor(), "cublas": now, "alone": alone, "together": layers.time(best), "best": best}


def markdown(document: Mapping[str, Any]) -> str:
    lines = [
        "# A layer of a decode step: its products by cuBLAS and by `kernels.small_product`, microseconds",
        "",
        environment_line(document["environment"]),
        "",
        "Bytes: what weights and states would take. Together: each product by the faster of both.",
        "",
        "| shape, batch | bytes | cuBLAS | in_proj | x_proj | out_proj | together |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in document["results"]:
        alone = [
            f"{min(r['alone'][p].values()):.2f}" if p in r["alone"] else "" for p in ("in_proj", "x_proj", "out_proj")
        ]
        figures = [f"{r['bytes']:.2f}", f"{r['cublas']:.2f}", *alone, f"{r['together']:.2f}"]
        lines.append(f"| {r['shape']}, {r['batch']} | {' | '.join(figures)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = ["mamba2-1.3b", "mamba-1.4b", "zamba2-1.2b", "falcon-mamba-7b"]
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=models)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = {"environment": environment(), "results": []}
    for name, batch in itertools.product(given.shapes, given.batches):
        layers = Layers(name, batch, given.layers)
        layers.compile_all()
        document["results"].append({"shape": name, "batch": batch, **measure(layers)})
        print(markdown({**document, "results": document["results"][-1:]}).splitlines()[-1], flush=True)
        (given.out / "small_products.json").write_text(json.dumps(document, indent=1) + "\n")
        (given.out / "small_products.md").write_text(markdown(document))
        del layers
    print(markdown(document))


if __name__ == "__main__":
    main()
