"""Are five sequences enough? Calibrates the example model several times on different text and counts the keys found.

    python benchmarks/calibration_groups.py

The tables are calibrated on the sample that comes with the package, one after the other in one engine; a second engine
then answers the questions of examples/passkey.py with each of them. Takes some minutes on a CPU core, writes
benchmarks/results/calibration_groups.md.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples" / "passkey-mamba2-4m"
TRAIN_LENGTH = 512

# Tables are exchanged within the engine, which only an engine in this process allows.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
sys.path.insert(0, str(ROOT / "examples"))


def main() -> None:
    """Calibrate, ask, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--groups", type=int, default=10, help="calibrations [%(default)s]")
    parser.add_argument("--lengths", default="4096", help="prompt lengths in bytes [%(default)s]")
    parser.add_argument("--depths", type=int, default=12, help="places of the key [%(default)s]")
    parser.add_argument("--trials", type=int, default=2, help="questions for each length and place [%(default)s]")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "calibration_groups.md")
    options = parser.parse_args()
    from passkey import passkey_tasks, read_haystack

    lengths = [int(length) for length in options.lengths.split(",")]
    started = time.monotonic()
    tables = _calibrate(options.groups)
    depths = [(number + 0.5) / options.depths for number in range(options.depths)]
    tasks = passkey_tasks(read_haystack(), lengths, depths, options.trials, seed=1)
    found = _answer(tables, tasks)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(_report(tables, tasks, found, lengths, time.monotonic() - started))
    print(options.output.read_text())


def _calibrate(groups: int) -> list[Any]:
    from vllm_longmamba.calibrate import CalibrationSettings, calibrate_groups

    settings = CalibrationSettings(train_length=TRAIN_LENGTH, max_length=16384)
    return list(calibrate_groups(groups, str(MODEL), None, settings, dtype="float32", gpu_memory_utilization=0.1))


def _answer(tables: list[Any], tasks: list[Any]) -> list[list[bool]]:
    """For each table, whether each question was answered."""
    from passkey import KEY_DIGITS
    from vllm import LLM, SamplingParams

    from vllm_longmamba.calibration_worker import use_table
    from vllm_longmamba.tables import save_table, table_to_bytes

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.safetensors"
        save_table(tables[0], path)
        llm = LLM(
            str(MODEL),
            model_impl="longmamba",
            dtype="float32",
            max_model_len=16384,
            max_num_seqs=16,
            enforce_eager=True,
            enable_prefix_caching=False,
            gpu_memory_utilization=0.1,
            additional_config={"longmamba": {"table": str(path)}},
        )
    sampling = SamplingParams(temperature=0.0, max_tokens=KEY_DIGITS)
    found = []
    for table in tables:
        llm.collective_rpc(use_table, args=(table_to_bytes(table),))
        outputs = llm.generate([task.prompt for task in tasks], sampling, use_tqdm=False)
        answers = [output.outputs[0].text for output in outputs]
        found.append([task.is_answered_by(answer) for task, answer in zip(tasks, answers, strict=True)])
    return found


def _report(tables: list[Any], tasks: list[Any], found: list[list[bool]], lengths: list[int], seconds: float) -> str:
    from vllm_longmamba.compatibility import installed_vllm_version

    first = tables[0].metadata
    lines = [
        "# Calibration on different samples of text",
        "",
        f"`python benchmarks/calibration_groups.py --groups {len(tables)} --lengths {','.join(map(str, lengths))}`: "
        f"{MODEL.name}, {first.num_sequences} sequences of {first.train_length} bytes a group, from {first.corpus}; "
        f"C = {first.clamp_percent:g} %, theta = {first.min_retention:g}; vLLM {installed_vllm_version()}, float32, "
        f"{os.cpu_count()} CPU cores, {seconds:.0f} s.",
        "",
        "| group (seed) | global channels | " + " | ".join(f"keys found at {length}" for length in lengths) + " |",
        "|---|---|" + "---|" * len(lengths),
    ]
    shares: dict[int, list[float]] = {length: [] for length in lengths}
    for table, hits in zip(tables, found, strict=True):
        cells = []
        for length in lengths:
            here = [hit for task, hit in zip(tasks, hits, strict=True) if task.length == length]
            shares[length].append(sum(here) / len(here))
            cells.append(f"{sum(here)} of {len(here)} ({shares[length][-1]:.2f})")
        global_channels = sum(int(table.is_global(layer).sum()) for layer in table.layers)
        lines.append(f"| {table.metadata.seed} | {global_channels} | " + " | ".join(cells) + " |")
    for name, cells in (
        ("mean", [f"{statistics.mean(shares[length]):.3f}" for length in lengths]),
        ("standard deviation", [f"{statistics.stdev(shares[length]):.3f}" for length in lengths]),
        ("largest - smallest", [f"{max(shares[length]) - min(shares[length]):.3f}" for length in lengths]),
    ):
        lines.append(f"| {name} | | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *_thresholds(tables), ""])


def _thresholds(tables: list[Any]) -> list[str]:
    """How far the thresholds agree, as `longmamba calibrate --groups` shows it."""
    import numpy as np

    from vllm_longmamba.tables import table_stability

    lines = [
        "Thresholds of the channels that are global in a group, over all rows: standard deviation over the groups in "
        "per cent of the mean.",
        "",
        "| layer | global channels, mean ± std | global in some groups only | median | 95 % | largest |",
        "|---|---|---|---|---|---|",
    ]
    for index, layer in table_stability(tables).items():
        counts = layer.global_channels
        cells = [f"{counts.mean():.1f} ± {counts.std(ddof=1):.1f}", str(layer.undecided)]
        if layer.ever_global.any():
            cells += [f"{value:.1%}" for value in np.quantile(layer.relative_std, [0.5, 0.95, 1.0])]
        else:
            cells += ["-"] * 3
        lines.append(f"| {index} | " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    main()
