"""Try launch sizes of the decode kernels on one GPU, in the place where they run: each layer of a model has others.

    python benchmarks/decode_sizes.py [--models NAME ...] [--states bfloat16 float32] [--out FOLDER]

An engine of vLLM's defaults decodes with dummy weights of published shapes. A kernel's time is that between the end of
the kernel in front of it and its own, so that a wait within it is not counted; median over steps and layers. Alone, in
a graph of its own, a kernel prefers other sizes than in a model. Writes decode_sizes.json and .md after each batch.
The best sizes are constants of kernels/selective_state_update_triton.py and kernels/causal_conv1d_update_triton.py.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from support.engine_process import EngineProcess
from support.environment import environment, environment_line
from support.markdown import markdown
from support.shapes import MODELS, model_config, write_model
from support.step_recorder import PROFILED, Event

# (channels a program, warps), by d_state
UPDATE_SIZES = {
    16: ((64, 1), (64, 2), (64, 4), (128, 1), (128, 2), (128, 4), (128, 8), (256, 8)),
    64: ((16, 1), (32, 1), (32, 2), (32, 4), (32, 8), (64, 2), (64, 4), (64, 8)),
    128: ((8, 1), (16, 1), (16, 2), (16, 8), (32, 2), (32, 8), (64, 4), (64, 8)),
}
# (sequences and channels a program, warps); as many as cannot stay in step with those above
CONV_SIZES = ((1, 128, 1), (1, 256, 2), (4, 128, 1), (4, 256, 2), (8, 128, 1), (8, 128, 2), (8, 256, 4))
BATCHES = (1, 16, 64, 128, 256)
# in front of those that are profiled
STEPS = 8
KERNELS = {"update": "_selective_state_update_kernel", "conv": "_causal_conv1d_update_kernel"}


def measure(
    name: str, state: str, batches: list[int], folder: Path, tiny: bool
) -> Iterator[tuple[int, dict[str, dict[str, float]]]]:
    """Yields (batch, microseconds of a kernel by its sizes, by kernel)."""
    config = model_config(name, tiny)
    sizes = {"update": UPDATE_SIZES[getattr(config, "mamba_d_state", None) or config.state_size], "conv": CONV_SIZES}
    os.environ["LAYER_SIZES"] = json.dumps(sizes)
    arguments = {
        "mamba_ssm_cache_dtype": state,
        "worker_extension_cls": "support.sizes_by_layer.SizesByLayer",
    }
    path = write_model(name, folder / name, tiny)
    engine = EngineProcess(name, path, True, {"tiny": tiny, "batches": batches, "arguments": arguments})
    try:
        print(f"{name}, {state}: started in {engine.wait():.0f} s", flush=True)
        for batch in batches:
            # twice: the first run compiles
            for _ in range(2):
                events = engine("timeline", batch, STEPS)
            yield batch, {kernel: medians(events, pattern, sizes[kernel]) for kernel, pattern in KERNELS.items()}
    finally:
        engine.close()


def medians(events: list[Event], pattern: str, sizes: tuple[tuple[int, ...], ...]) -> dict[str, float]:
    """Microseconds by sizes, the best first; empty where the kernel does not run."""
    own: list[float] = []
    for before, event in itertools.pairwise(sorted(events, key=lambda event: event[1])):
        if pattern in event[0]:
            own.append(event[2] - max(event[1], before[2]))
    layers = len(own) // PROFILED
    times: dict[str, list[float]] = {}
    for number, time in enumerate(own):
        times.setdefault("/".join(map(str, sizes[number % layers % len(sizes)])), []).append(time)
    found = {name: round(statistics.median(values), 2) for name, values in times.items()}
    return dict(sorted(found.items(), key=lambda item: item[1]))


def page(document: dict[str, Any]) -> str:
    """The three best sizes of each case."""
    rows = []
    for found in document["results"]:
        cells = (
            ", ".join(f"{sizes}: {time:.2f}" for sizes, time in list(times.items())[:3])
            for times in found["microseconds"].values()
        )
        rows.append([found["model"], found["state"], str(found["batch"]), *cells])
    head = ["model", "state", "batch", "state update: channels / warps", "convolution: sequences / channels / warps"]
    lines = [
        "# Launch sizes of the decode kernels within a model, microseconds",
        "",
        environment_line(document["environment"]),
        "",
        "The three best of those in `benchmarks/decode_sizes.py`; each layer of the model had others.",
        "",
        markdown(head, rows),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--states", nargs="+", choices=["bfloat16", "float32"], default=["bfloat16", "float32"])
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--tiny", action="store_true", help="tiny models, to try the script out without a GPU")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = {"environment": environment(), "results": []}
    with tempfile.TemporaryDirectory() as folder:
        for name, state in itertools.product(given.models, given.states):
            for batch, found in measure(name, state, given.batches, Path(folder) / state, given.tiny):
                document["results"].append({"model": name, "state": state, "batch": batch, "microseconds": found})
                print(page({**document, "results": document["results"][-1:]}).splitlines()[-1], flush=True)
                (given.out / "decode_sizes.json").write_text(json.dumps(document, indent=1) + "\n")
                (given.out / "decode_sizes.md").write_text(page(document))


if __name__ == "__main__":
    main()
