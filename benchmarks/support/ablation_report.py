"""The report of an ablation as Markdown: a row for each variant, columns for each length."""

from collections.abc import Mapping
from typing import Any

from vllm_longmamba.evaluate.markdown import interval, table

TITLES = {
    "theta": "Theta (min_retention)",
    "clamp": "C (clamp_percent)",
    "groups": "Calibration on different sequences",
    "rows": "Rounding the prompt length to rows",
    "decode": "Filtering generated text",
    "end": "An unfiltered end of prompts",
    "state": "float32 and bfloat16 state",
}
NOTES = {
    "theta": "The table is the same; theta decides which channels are filtered.",
    "clamp": "A calibration for each C, on the same sequences; theta as in the model's table.",
    "groups": "Calibrations that differ in the seed that draws their sequences.",
    "rows": "Thresholds for the exact length, and for the nearest of rows at these distances. The lengths lie half way "
    "between rows.",
    "decode": "The first half of each text is the prompt, which is filtered by its own length; the second half is run "
    "as generated text: not filtered, as in the papers; filtered by the length of the prompt; or by the growing length "
    "of prompt and generated text. Keys stand in the first half, and the question is part of the second.",
    "end": "The last tokens of prompts are not filtered; those before keep a part (budget) of what the training length "
    "has. A calibration without a clamp for each budget; theta as in the model's table.",
    "state": "In vLLM, 512 tokens a step: the state is rounded to its type after each step. All else in float32.",
}

TASKS = {"passkey": "Pass keys found", "needles": "Needles found, one of several is asked for"}


def ablation_markdown(report: Mapping[str, Any]) -> str:
    """Title, tables and conditions.

    Args:
        report: as ablations.py writes it.
    """
    name = report["ablation"]
    conditions = [
        f"- Model: {report['model']}",
        f"- Command: `{report['command']}`",
        f"- Hardware: {report['hardware']}",
    ]
    settings = ", ".join(
        f"{key} {value}" for key, value in report["settings"].items() if key not in ("wording", "texts")
    )
    texts = ", ".join(report["settings"]["texts"])
    first = next(iter(report["methods"].values()))
    versions = ", ".join(f"{key} {first[key]}" for key in ("torch", "vllm", "vllm_longmamba") if first.get(key))
    conditions += [f"- Settings: {settings}; texts: {texts}; {versions}"]
    parts = [
        f"# {TITLES[name]}",
        NOTES[name],
        *(_found(report, task, title) for task, title in TASKS.items() if task in report),
        _losses(report),
        "## Conditions",
        "\n".join(conditions),
    ]
    return "\n\n".join(parts) + "\n"


def _found(report: Mapping[str, Any], task: str, title: str) -> str:
    lengths = sorted({row["length"] for row in report[task]})
    cells = {(row["method"], row["length"]): row for row in report[task]}
    questions = report[task][0]["questions"]
    rows = [
        [name, *_channels(report, name), *(interval(cells[name, length], "share", ".2f") for length in lengths)]
        for name in report["methods"]
    ]
    text = f"{title}, {questions} questions a cell (95 %, Wilson), by tokens of the prompt:\n\n"
    return text + table(["variant", *_channels_header(report), *map(str, lengths)], rows)


def _losses(report: Mapping[str, Any]) -> str:
    lengths = sorted({row["length"] for row in report["perplexity"]})
    cells = {(row["method"], row["length"]): row for row in report["perplexity"]}
    header = ["variant"]
    for length in lengths:
        header += [str(length), "less plain"]
    rows = []
    for name in report["methods"]:
        row = [name]
        for length in lengths:
            cell = cells[name, length]
            row.append(f"{cell['loss']:.3f}")
            row.append(interval(cell["difference"], "loss", "+.3f") if "difference" in cell else "")
        rows.append(row)
    first = report["perplexity"][0]
    text = (
        f"Loss of the last {report['settings']['scored_tokens']} tokens of {first['windows']} windows of "
        f"{first['books']} texts, nats a token, and its difference to the plain model on the same windows "
        "(95 %, bootstrap):\n\n"
    )
    return text + table(header, rows)


def _channels_header(report: Mapping[str, Any]) -> list[str]:
    return ["global channels"] if any("global_channels" in values for values in report["methods"].values()) else []


def _channels(report: Mapping[str, Any], name: str) -> list[str]:
    return [str(report["methods"][name].get("global_channels", 0))] if _channels_header(report) else []
