"""Starts `vllm serve`, and lets `longmamba summarize` send it a folder of documents.

    python examples/summarize_server.py

Any OpenAI-compatible server will do; a job survives its restart. Writes out/from_server.jsonl.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from serving import running_server

MODEL = "examples/passkey-mamba2-4m"
OUTPUT = Path("out/from_server.jsonl")


def main() -> None:
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    arguments = ["--model-impl", "longmamba", "--dtype", "float32", "--max-model-len", "8192", "--max-num-seqs", "16"]
    with running_server(MODEL, arguments, Path("out/summarize_server.log")) as url:
        longmamba = str(Path(sys.executable).with_name("longmamba"))
        job = [longmamba, "summarize", "examples/texts", "-o", str(OUTPUT), "--base-url", url]
        subprocess.run([*job, "--fit", "truncate", "--max-tokens", "40", "--concurrency", "4"], check=True)
    for row in map(json.loads, OUTPUT.read_text().splitlines()):
        print(f"{row['id']}: {row['dropped_tokens']} tokens cut off: {row['summary']!r}")


if __name__ == "__main__":
    main()
