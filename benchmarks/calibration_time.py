"""How much longer an engine takes to start if it makes its table of thresholds: dummy weights of published shapes.

    python benchmarks/calibration_time.py [--models NAME ...] [--tp 2] [--runs 2] [--out FOLDER]

Every start is a process of its own. Stock vLLM and `--model-impl longmamba` without a table take turns; each has a
compilation cache of its own, empty in its first run and filled in the others. Writes calibration_time_tp<N>.json as it
goes, and at the end the .md of the same name. `--tiny` tries the script out on a CPU.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

MODELS = ("mamba-1.4b", "mamba2-1.3b", "zamba2-1.2b")
TRAIN_LENGTHS = {"mamba-1.4b": 2048, "mamba2-1.3b": 2048, "zamba2-1.2b": 4096}
MODES = ("stock", "longmamba")
CALIBRATED = re.compile(r"LongMamba: calibrated in ([0-9.]+) s on (\d+) sequences of the training length of (\d+)")

# Run by a process for each start; argv: the arguments of LLM as JSON.
START = """
import json, sys, time
started = time.monotonic()
from vllm import LLM
imported = time.monotonic()
if __name__ == "__main__":
    LLM(**json.loads(sys.argv[1]))
    print("SECONDS", json.dumps([imported - started, time.monotonic() - imported]), flush=True)
"""


def main() -> None:
    """Measure, and write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel degree [%(default)s]")
    parser.add_argument("--runs", type=int, default=2, help="starts of each engine [%(default)s]")
    parser.add_argument("--cache-gib", type=int, help="of each engine, where other work shares the GPU [what is free]")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to try the script out on a CPU")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    file = given.out / f"calibration_time_tp{given.tp}.json"
    document: dict[str, Any] = {"environment": _environment(), "tp": given.tp, "cache_gib": given.cache_gib}
    document |= {"tiny": given.tiny, "models": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name in given.models:
            model = _write_model(name, Path(folder) / name, given.tiny)
            starts = document["models"].setdefault(name, {mode: [] for mode in MODES})
            for _ in range(given.runs):
                for mode in MODES:
                    starts[mode].append(_start(name, model, mode, given))
                    print(f"{name:12} {mode:10} {starts[mode][-1]}", flush=True)
                    file.write_text(json.dumps(document, indent=1) + "\n")
    file.with_suffix(".md").write_text(_report(document))
    print(file.with_suffix(".md").read_text())


def _environment() -> dict[str, str]:
    import torch

    from vllm_longmamba.compatibility import installed_vllm_version

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    return {
        "device": device,
        "python": platform.python_version(),
        "vllm": installed_vllm_version(),
        "torch": torch.__version__,
        "date": datetime.now(UTC).date().isoformat(),
    }


def _write_model(name: str, folder: Path, tiny: bool) -> Path:
    from support.byte_documents import add_tokenizer
    from support.shapes import model_config

    config = model_config(name, tiny)
    if config.model_type == "zamba2":
        config.max_position_embeddings = TRAIN_LENGTHS[name]
    config.save_pretrained(folder)
    # Bytes as tokens: the sequences are no text the model knows, but dummy weights know none.
    add_tokenizer(folder)
    return folder


def _start(name: str, model: Path, mode: str, given: argparse.Namespace) -> dict[str, float]:
    """Start an engine once; its seconds, and those of the calibration as its log tells them."""
    arguments: dict[str, Any] = {
        "model": str(model),
        "load_format": "dummy",
        "tensor_parallel_size": given.tp,
        "max_model_len": 32768,
        "max_num_seqs": 16 if given.tiny else 128,
        "dtype": "float32" if given.tiny else "bfloat16",
    }
    if given.tiny:
        arguments |= {"gpu_memory_utilization": 0.1, "enforce_eager": True}
    if given.cache_gib:
        arguments |= {"gpu_memory_utilization": 0.05, "kv_cache_memory_bytes": given.cache_gib * 2**30}
    if mode == "longmamba":
        arguments |= {
            "model_impl": "longmamba",
            "additional_config": {"longmamba": {"train_length": 256 if given.tiny else TRAIN_LENGTHS[name]}},
        }
    cache = model.parent / f"cache-{name}-{mode}"
    environment = os.environ | {"XDG_CACHE_HOME": str(cache), "VLLM_CACHE_ROOT": str(cache / "vllm")}
    environment |= {"VLLM_LOGGING_LEVEL": "INFO", "HF_HUB_OFFLINE": "1", "TRITON_CACHE_DIR": str(cache / "triton")}
    # Stock vLLM takes no longer prompts than Zamba2's config tells.
    environment["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
    environment |= {"TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor")}
    script = model.parent / "start.py"
    script.write_text(START)
    command = [sys.executable, str(script), json.dumps(arguments)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    output = result.stdout + result.stderr
    seconds = re.search(r"SECONDS (\[.*\])", output)
    if result.returncode != 0 or seconds is None:
        raise SystemExit(f"{name}, {mode}: the engine did not start:\n{output[-6000:]}")
    imports, start = json.loads(seconds[1])
    figures = {"imports": round(imports, 2), "start": round(start, 2)}
    calibrated = CALIBRATED.search(output)
    if mode == "longmamba":
        if calibrated is None:
            raise SystemExit(f"{name}: the engine's log tells of no calibration:\n{output[-6000:]}")
        figures["calibration"] = float(calibrated[1])
    return figures


def _report(document: dict[str, Any]) -> str:
    environment = ", ".join(f"{name} {value}" for name, value in document["environment"].items())
    lines = [
        f"# Calibration at the start, tensor-parallel degree {document['tp']}",
        "",
        f"`python benchmarks/calibration_time.py --tp {document['tp']}`; {environment}.",
        "",
        f"Dummy weights of {'tiny' if document['tiny'] else 'the published'} shapes. Seconds of `LLM(...)`, "
        "imports not counted; calibration: as the engine's log tells it, five sequences of the training length, "
        "text read and tokenized. First start: nothing is compiled yet; others: compiled code is in the cache.",
        "",
        "| model | start | stock vLLM | longmamba | longer by | of that calibration |",
        "|---|---|---|---|---|---|",
    ]
    for name, starts in document["models"].items():
        for run, (stock, ours) in enumerate(zip(starts["stock"], starts["longmamba"], strict=True), start=1):
            longer = ours["start"] / stock["start"] - 1
            seconds = f"{stock['start']:.1f} | {ours['start']:.1f} | {longer:.1%} | {ours['calibration']:.1f}"
            lines.append(f"| {name} | {run} | {seconds} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
