"""Does a self-made table find as many keys as the shipped one, and are five sequences enough?

    python benchmarks/calibration_groups.py                              (10 groups, an hour of one CPU core)
    python3 benchmarks/calibration_groups.py --sequences 5 20 --seeds 10  (on a GPU, minutes)

The example model is calibrated several times, on other sequences of the sample that comes with the package each time.
A second engine is then asked the same questions with every table, the shipped one first: 12 places of the key and
--seeds keys and pieces of text for each, which are the questions of tests/engine/test_passkey.py. Needs no network.
Writes benchmarks/results/calibration_groups.md anew after each setting.
"""

import argparse
import os
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples" / "passkey-mamba2-4m"
SHIPPED = ROOT / "tables" / "shipped" / "passkey-mamba2-4m.safetensors"
TRAIN_LENGTH = 512
DEPTHS = [(number + 0.5) / 12 for number in range(12)]
ENGINE = {"dtype": "float32", "gpu_memory_utilization": 0.1}

# Tables are exchanged within the engine, which only an engine in this process allows.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
# Triton's default for matrix products of float32 is tf32.
os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")
sys.path.insert(0, str(ROOT / "examples"))


@dataclass
class Setting:
    """How some tables were made, and what they found.

    Attributes:
        name: for the report.
        tables: one for each group.
        found: length -> keys found with each table.
    """

    name: str
    tables: list[Any]
    found: dict[int, list[int]] = field(default_factory=dict)


def main() -> None:
    """Calibrate, ask, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=10, help="calibrations for each setting [%(default)s]")
    parser.add_argument(
        "--sequences", type=int, nargs="+", default=[5], help="settings: sequences of a calibration [5]"
    )
    parser.add_argument("--method", help="as for longmamba calibrate")
    parser.add_argument("--clamp-percent", type=float, help="likewise")
    parser.add_argument("--min-retention", type=float, help="likewise")
    parser.add_argument("--combine", help="likewise")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096], help="prompts, in bytes [2048 4096]")
    parser.add_argument("--seeds", type=int, default=3, help="questions for each length and place [%(default)s]")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "calibration_groups.md")
    options = parser.parse_args()
    from passkey import passkey_tasks, read_haystack

    from vllm_longmamba.tables import load_table

    started = time.monotonic()
    shipped = load_table(SHIPPED)
    # One engine for all tables: they must have the same rows.
    longest = int(shipped.row_lengths[-1])
    settings = [Setting("shipped, made of a book", [shipped])]
    for number in options.sequences:
        tables = _calibrate(number, longest, options)
        settings.append(Setting(f"self-made, {number} sequences", tables))
    haystack = read_haystack()
    tasks = {
        length: [task for seed in range(options.seeds) for task in passkey_tasks(haystack, [length], DEPTHS, seed=seed)]
        for length in options.lengths
    }
    llm = _engine(max_model_len=max(options.lengths) + 64)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    for done, setting in enumerate(settings, 1):
        for length in options.lengths:
            setting.found[length] = [_found(llm, table, tasks[length]) for table in setting.tables]
            print(f"{setting.name}, {length} bytes: {setting.found[length]} of {len(tasks[length])}", flush=True)
        report = _report(settings[:done], len(DEPTHS) * options.seeds, time.monotonic() - started)
        options.output.write_text(report)
    print(options.output.read_text())


def _calibrate(num_sequences: int, longest: int, options: argparse.Namespace) -> list[Any]:
    from vllm_longmamba.calibration.offline import calibrate_groups
    from vllm_longmamba.calibration.settings import CalibrationSettings

    settings = CalibrationSettings(
        num_sequences=num_sequences,
        train_length=TRAIN_LENGTH,
        max_length=longest,
        method=options.method,
        clamp_percent=options.clamp_percent,
        min_retention=options.min_retention,
        combine=options.combine,
    )
    return list(calibrate_groups(options.groups, str(MODEL), None, settings, **_memory(), **ENGINE))


def _engine(max_model_len: int) -> Any:
    from vllm import LLM

    return LLM(
        str(MODEL),
        model_impl="longmamba",
        max_model_len=max_model_len,
        max_num_seqs=16,
        enforce_eager=True,
        enable_prefix_caching=False,
        additional_config={"longmamba": {"table": str(SHIPPED)}},
        **_memory(),
        **ENGINE,
    )


def _memory() -> dict[str, int]:
    """Given a size of the cache, vLLM does not measure a GPU's memory, which the engines of this process share."""
    import torch

    return {"kv_cache_memory_bytes": 2**30} if torch.cuda.is_available() else {}


def _found(llm: Any, table: Any, tasks: list[Any]) -> int:
    """How many keys are found with a table."""
    from passkey import KEY_DIGITS
    from vllm import SamplingParams

    from vllm_longmamba.calibration.worker import use_table
    from vllm_longmamba.tables import table_to_bytes

    llm.collective_rpc(use_table, args=(table_to_bytes(table),))
    sampling = SamplingParams(temperature=0.0, max_tokens=KEY_DIGITS)
    outputs = llm.generate([task.prompt for task in tasks], sampling, use_tqdm=False)
    return sum(task.is_answered_by(output.outputs[0].text) for task, output in zip(tasks, outputs, strict=True))


def _report(settings: list[Setting], questions: int, seconds: float) -> str:
    import torch

    from vllm_longmamba.compatibility import installed_vllm_version

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    made = settings[-1].tables[0].metadata
    lengths = list(settings[0].found)
    lines = [
        "# Calibration on different samples of text",
        "",
        f"`{' '.join(['python', *sys.argv])}`: {MODEL.name}, sequences of {made.train_length} bytes; the self-made "
        f"tables from {made.corpus}; C = {made.clamp_percent:g} %, theta = {made.min_retention:g}, "
        f"sequences combined by {made.combine!r}; vLLM "
        f"{installed_vllm_version()}, float32, {device}, {seconds:.0f} s. Every table is asked the same {questions} "
        "questions of each length.",
        "",
        f"| table | groups | {' | '.join(f'found at {length}: mean, min to max, std' for length in lengths)} |",
        "|---|---|" + "---|" * len(lengths),
    ]
    for setting in settings:
        cells = [_spread(setting.found[length], questions) for length in lengths]
        lines.append(f"| {setting.name} | {len(setting.tables)} | " + " | ".join(cells) + " |")
    for setting in settings[1:]:
        lines += ["", f"## {setting.name.capitalize()}", "", *_groups(setting), "", *_thresholds(setting.tables)]
    return "\n".join([*lines, ""])


def _spread(found: list[int], questions: int) -> str:
    shares = [number / questions for number in found]
    if len(shares) == 1:
        return f"{found[0]} ({shares[0]:.3f})"
    return f"{statistics.mean(shares):.3f}, {min(shares):.3f} to {max(shares):.3f}, {statistics.stdev(shares):.3f}"


def _groups(setting: Setting) -> list[str]:
    """Each group: its seed, its channels, and what it found."""
    lines = [
        "| group (seed) | global channels | " + " | ".join(f"found at {length}" for length in setting.found) + " |",
        "|---|---|" + "---|" * len(setting.found),
    ]
    for number, table in enumerate(setting.tables):
        channels = table.count_global()
        cells = " | ".join(str(found[number]) for found in setting.found.values())
        lines.append(f"| {table.metadata.seed} | {channels} | {cells} |")
    return lines


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
        if not layer.ever_global.any():
            continue
        counts = layer.global_channels
        cells = [f"{counts.mean():.1f} ± {counts.std(ddof=1):.1f}", str(layer.undecided)]
        cells += [f"{value:.1%}" for value in np.quantile(layer.relative_std, [0.5, 0.95, 1.0])]
        lines.append(f"| {index} | " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    main()
