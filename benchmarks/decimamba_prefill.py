"""Time the prefill of long prompts with dummy weights: stock vLLM, --model-impl longmamba and --model-impl decimamba.

    python benchmarks/decimamba_prefill.py --out decimamba_prefill.json [--models NAME ...] [--lengths TOKENS ...]

DeciMamba decimates in layer 12 of 48 and keeps 4000 tokens, as LongMamba's authors have it for mamba-1.4b. The three
engines of a model take turns, each in a process of its own, with vLLM's defaults. Prints a table of medians.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from support.engine_process import EngineProcess
from support.environment import environment
from support.shapes import GIB, write_model

MODELS = ("mamba-1.4b", "mamba2-1.3b")
LENGTHS = [16384, 32768, 65536]
SETTINGS = {"layers": [12], "L_base": 4000}
TINY_SETTINGS = {"layers": [0], "L_base": 64}
METHODS = ("stock", "longmamba", "decimamba")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, help="tokens of a prompt")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each kind, after one that is not")
    parser.add_argument(
        "--tiny", action="store_true", help="tiny models, to try the script out; without a GPU, mamba2-1.3b only"
    )
    return parser.parse_args()


def start(name: str, folder: Path, is_tiny: bool) -> dict[str, EngineProcess]:
    """Stock vLLM first: it tries sizes of its prefill kernels while it starts."""
    path = write_model(name, folder / name, is_tiny)
    own: dict[str, dict[str, Any]] = {"stock": {}, "longmamba": {}}
    settings = TINY_SETTINGS if is_tiny else SETTINGS
    own["decimamba"] = {"model_impl": "decimamba", "additional_config": {"decimamba": settings}}
    engines = {}
    for method in METHODS:
        changed = {**({} if is_tiny else {"kv_cache_memory_bytes": 2 * GIB}), **own[method]}
        options = {"tiny": is_tiny, "batches": [4], "arguments": changed}
        engines[method] = EngineProcess(name, path, method != "stock", options)
        if method == "stock":
            engines[method].wait()
    for method in METHODS[1:]:
        engines[method].wait()
    return engines


def measure(engines: dict[str, EngineProcess], lengths: list[int], repeats: int) -> dict[str, Any]:
    """Seconds to the first token: prompt length -> method -> median and all."""
    results = {}
    for length in lengths:
        times: dict[str, list[float]] = {method: [] for method in METHODS}
        for repeat in range(repeats + 1):
            for method, engine in engines.items():
                seconds = engine("generate", 1, length, 1)
                # the first run compiles kernels
                if repeat:
                    times[method].append(seconds)
        results[str(length)] = {
            method: {"median": statistics.median(all_), "all": all_} for method, all_ in times.items()
        }
    return results


def table(models: dict[str, Any]) -> str:
    """Medians in milliseconds, and how many times faster DeciMamba is."""
    lines = ["| model | prompt | stock | longmamba | decimamba | than stock | than longmamba |", "|" + "---|" * 7]
    for name, lengths in models.items():
        for length, figures in lengths.items():
            stock, longmamba, decimamba = (figures[method]["median"] for method in METHODS)
            cells = [name, length, *(f"{1e3 * seconds:.1f} ms" for seconds in (stock, longmamba, decimamba))]
            cells += [f"{stock / decimamba:.2f} x", f"{longmamba / decimamba:.2f} x"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    given = arguments()
    settings = TINY_SETTINGS if given.tiny else SETTINGS
    document: dict[str, Any] = {"environment": environment(), "settings": settings, "models": {}}
    for name in given.models:
        with tempfile.TemporaryDirectory() as folder:
            engines = start(name, Path(folder), given.tiny)
            try:
                document["models"][name] = measure(engines, given.lengths, given.repeats)
            finally:
                for engine in engines.values():
                    engine.close()
        given.out.write_text(json.dumps(document, indent=1) + "\n")
    print(table(document["models"]))


if __name__ == "__main__":
    main()
