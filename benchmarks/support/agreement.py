"""Tables of how far implementations are apart: reports of engine_vs_torch.py and peer_mamba_ssm.py as Markdown."""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ENGINE, PEER = "engine_vs_torch.json", "peer_mamba_ssm.json"
TITLES = {ENGINE: "The engine beside the torch reference", PEER: "Beside mamba_ssm's MambaLMHeadModel, plain"}

# Of log-probabilities in float32.
TOLERANCE = 1e-3
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "passkey-mamba2-4m"
RESULTS = Path(__file__).resolve().parents[1] / "results"
_SETTINGS = ("prompts", "shortest", "longest", "scored", "seed")


def argument_parser(doc: str, longest: int, output: str) -> argparse.ArgumentParser:
    """The arguments of both scripts.

    Args:
        doc: the script's.
        longest: default of the longest prompts, in tokens.
        output: name of the JSON among the results, ENGINE or PEER.
    """
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0])
    parser.add_argument("folders", nargs="*", type=Path, default=[EXAMPLE], metavar="FOLDER")
    parser.add_argument("--prompts", type=int, default=20, help="for each model [%(default)s]")
    parser.add_argument("--shortest", type=int, default=120, help="tokens [%(default)s]")
    parser.add_argument("--longest", type=int, default=longest, help="tokens [%(default)s]")
    parser.add_argument("--scored", type=int, default=100, help="last tokens that are compared [%(default)s]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / output)
    return parser


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """What a report says of how its prompts were made."""
    return {name: getattr(options, name) for name in _SETTINGS}


def write_agreement(document: Mapping[str, Any], title: str, output: Path) -> None:
    """Write JSON and Markdown, and exit where a difference exceeds the tolerance; see `document_markdown`."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(document, indent=1) + "\n")
    output.with_suffix(".md").write_text(document_markdown(document, title))
    print(output.with_suffix(".md").read_text())
    worst = max(gap["largest"] for pairs in document["models"].values() for gap in pairs.values())
    if worst > TOLERANCE:
        sys.exit(f"the largest difference, {worst:.1e}, exceeds {TOLERANCE:g}")


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
