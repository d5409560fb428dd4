"""Writes docs/results.md from the JSON reports under benchmarks/results.

    python benchmarks/results_page.py

benchmarks/results/MODEL/ANY_FOLDER/report.json is a report of `longmamba eval passkey|needles|perplexity` or `longmamba
tune` (give the command `-o benchmarks/results/MODEL/passkey`, say) or of ablations.py. Beside the folders there may be
engine_vs_torch.json and peer_mamba_ssm.json. Pictures that a report lacks are drawn beside it. Every number comes from
one of these files, with its command and hardware.
"""

import argparse
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from support.agreement import agreement_markdown

ROOT = Path(__file__).resolve().parent.parent
# Pixels: the pictures of one panel stay as they are.
WIDE = 1700
# The order of the sections of a model.
TASKS = ("passkey", "needles", "perplexity", "tune", "ablation")

HEAD = """\
# Results

Written by `python benchmarks/results_page.py` from the reports under `benchmarks/results/`; do not edit.

Methods: *plain* and *LongMamba* run in vLLM through this plugin; *LongMamba, paper* with a table of the paper's method,
*LongMamba, closed loop* with one of `longmamba calibrate --method closed-loop` (docs/closed_loop.md). *DeciMamba*
(arXiv 2406.14528), *plain (torch)* and *LongMamba (torch)* run in the torch reference in float32 (docs/decimamba.md).
Lengths are tokens of the model's own tokenizer; all models here read bytes, so that a token is a byte. Intervals are
95 %.
"""

LIMITS = """\
## What this does not show

- **Size.** The models here have 1.1 to 3.9 million parameters and were trained on 512 bytes at a time. Nothing was
  run on the checkpoints of the papers (mamba-130m to 2.8b, mamba2-1.3b, Zamba2-1.2B, FalconMamba-7B), which could not
  be downloaded where this was made. Their tables are not repeated here; `longmamba eval` and lm-eval run them where
  the checkpoints are.
- **Tasks.** A key or a number with a name is looked up word for word. That is what LongMamba's own demonstration
  asks, and the easiest use of a long memory. No summaries, no answers that need several places, no code. The models
  were trained on these very sentences; a model that was not may fail for other reasons than length.
- **Text.** Perplexity is of English books in the public domain. Models of this size predict the next byte from the
  last few hundred; what more context can give them is small, with any method.
- **Statistics.** Questions share a few texts, and windows a few books. Intervals over books are narrow because books
  are few. Where settings were chosen (theta, C, DeciMamba's), they were chosen by the same kind of question, not by
  the same questions.
- **Choice of settings.** LongMamba's theta and C come from a table that was calibrated or tuned for each model;
  DeciMamba's come from a search of its own, given in its reports. DeciMamba's paper fine-tunes with decimation for
  the pass key; here nothing is fine-tuned.
- **Precision.** float32 unless a report says otherwise. A comparison of engines' speed is not part of this page.
"""


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "docs" / "results.md")
    options = parser.parse_args()
    parts = [HEAD]
    for folder in sorted(path for path in options.results.iterdir() if path.is_dir()):
        parts += _model(folder, options.output.parent)
    parts += agreement_markdown(options.results)
    parts.append(LIMITS)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text("\n\n".join(part.strip("\n") for part in parts) + "\n", encoding="utf-8")
    print(f"written: {options.output}")


def _model(folder: Path, page: Path) -> list[str]:
    """The sections of one model; none where it has no report that belongs here."""
    reports = [(file.parent, json.loads(file.read_text())) for file in sorted(folder.glob("*/report.json"))]
    reports = [(place, report) for place, report in reports if report["task"] in TASKS]
    reports.sort(key=lambda pair: TASKS.index(pair[1]["task"]))
    if not reports:
        return []
    parts = [f"## {folder.name}"]
    if (folder / "README.md").exists():
        parts.append(f"Remarks: [{folder.name}]({_link(folder / 'README.md', page)}).")
    return parts + [_section(place, report, page) for place, report in reports]


def _section(folder: Path, report: Mapping[str, Any], page: Path) -> str:
    from support.ablation_report import ablation_markdown

    from vllm_longmamba.evaluate.markdown import perplexity_markdown, questions_markdown
    from vllm_longmamba.evaluate.tuning_report import tuning_markdown

    task = report["task"]
    pictures = [_link(picture, page) for picture in _pictures(folder, report)]
    if task == "ablation":
        text = ablation_markdown(report)
    elif task == "tune":
        text = tuning_markdown(report, pictures)
    elif task == "perplexity":
        text = perplexity_markdown(report, pictures)
    else:
        text = questions_markdown(report, _title(report), pictures)
    # One level for the model is above, and the conditions are part of a section here.
    text = re.sub(r"^#(#?) ", r"###\1 ", text, flags=re.MULTILINE)
    return text.replace("#### Conditions\n\n", "")


def _title(report: Mapping[str, Any]) -> str:
    if report["task"] == "passkey":
        return "Pass key"
    return f"{report['settings']['needles']} numbers with names, asked for {report['settings']['ask']}"


def _pictures(folder: Path, report: Mapping[str, Any]) -> list[Path]:
    """The PNG files beside a report, drawn where there are none and matplotlib is installed."""
    from vllm_longmamba.evaluate.command_line import drawn
    from vllm_longmamba.evaluate.pictures import draw_perplexity, draw_questions
    from vllm_longmamba.evaluate.tuning_report import draw_tuning

    if report["task"] == "ablation":
        return []
    if not any(folder.glob("*.png")):
        name = Path(report["model"]).name
        if report["task"] == "tune":
            drawn(lambda: draw_tuning(report, folder))
        elif report["task"] == "perplexity":
            drawn(lambda: draw_perplexity(report, folder, f"Perplexity: {name}"))
        else:
            drawn(lambda: draw_questions(report, folder, f"{_title(report)}: {name}"))
        _keep_small(folder)
    return sorted(folder.glob("*.png"))


def _keep_small(folder: Path) -> None:
    """The repository has no room for more than PNG files of few colours, and not for wide ones."""
    from PIL import Image

    for picture in folder.glob("*.svg"):
        picture.unlink()
    for picture in folder.glob("*.png"):
        image = Image.open(picture).convert("RGB")
        if image.width > WIDE:
            image.thumbnail((WIDE, image.height))
        image.quantize(48).save(picture, optimize=True)


def _link(file: Path, page: Path) -> str:
    return Path(os.path.relpath(file, page)).as_posix()


if __name__ == "__main__":
    main()
