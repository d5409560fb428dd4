"""Tables of how far implementations are apart: reports of engine_vs_torch.py and peer_mamba_ssm.py as Markdown."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ENGINE, PEER = "engine_vs_torch.json", "peer_mamba_ssm.json"
TITLES = {ENGINE: "The engine beside the torch reference", PEER: "Beside mamba_ssm's MambaLMHeadModel, plain"}


def document_markdown(document: Mapping[str, Any], title: str) -> str:
    """One report.

    Args:
        document: "environment", "settings" and "models": model -> what is compared -> largest and mean difference.
        title: of the report.
    """
    where, settings = document["environment"], document["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    lines = [
        f"# {title}",
        "",
        f"{where['device']}; {versions}; {where['date']}; `{where['command']}`.",
        "",
        f"float32; log-probabilities of the last {settings['scored']} tokens of {settings['prompts']} prompts of "
        f"random tokens, {settings['shortest']} to {settings['longest']} tokens long (seed {settings['seed']}).",
        "",
        "| model | compared | largest difference | mean |",
        "|---|---|---:|---:|",
    ]
    for model, pairs in document["models"].items():
        lines += [f"| {model} | {name} | {gap['largest']:.1e} | {gap['mean']:.1e} |" for name, gap in pairs.items()]
    return "\n".join(lines) + "\n"


def agreement_markdown(results: Path) -> list[str]:
    """The section of the results page: a heading and the reports that are there; nothing where there is none."""
    parts = [
        document_markdown(json.loads((results / name).read_text()), title).replace("# ", "### ", 1)
        for name, title in TITLES.items()
        if (results / name).exists()
    ]
    return ["## Do the implementations agree?", *parts] if parts else []
