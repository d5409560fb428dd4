"""Runs an OpenAI batch file with the `vllm run-batch` command, and prints the answers.

    python examples/batch_files.py

Batch files know /v1/chat/completions but not /v1/completions, so that a base model needs a chat template: the one that
comes with the package passes the content of the messages through as it is. Writes out/batch/.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from passkey import KEY_DIGITS, passkey_tasks, read_haystack
from serving import SERVER_ENVIRONMENT

MODEL = "examples/passkey-mamba2-4m"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/batch"), help="folder for both files [%(default)s]")
    out = parser.parse_args().out
    from vllm_longmamba.chat_templates import PASS_THROUGH

    tasks = passkey_tasks(read_haystack(), lengths=[500, 2048], depths=[0.1, 0.5, 0.9])
    out.mkdir(parents=True, exist_ok=True)
    requests, answers = out / "requests.jsonl", out / "answers.jsonl"
    with requests.open("w") as lines:
        for number, task in enumerate(tasks):
            body = {
                "model": MODEL,
                "messages": [{"role": "user", "content": task.prompt}],
                "max_tokens": KEY_DIGITS,
                "temperature": 0.0,
            }
            line = {"custom_id": str(number), "method": "POST", "url": "/v1/chat/completions", "body": body}
            lines.write(json.dumps(line) + "\n")
    vllm = str(Path(sys.executable).with_name("vllm"))
    command = [vllm, "run-batch", "-i", str(requests), "-o", str(answers), "--model", MODEL]
    command += ["--model-impl", "longmamba", "--dtype", "float32", "--max-model-len", "4096", "--max-num-seqs", "16"]
    command += ["--chat-template", str(PASS_THROUGH)]
    subprocess.run(command, env=SERVER_ENVIRONMENT | os.environ, check=True)
    for line in map(json.loads, answers.read_text().splitlines()):
        task = tasks[int(line["custom_id"])]
        if line["error"] is not None or line["response"]["status_code"] != 200:
            raise SystemExit(f"no answer to {line['custom_id']}: {line}")
        text = line["response"]["body"]["choices"][0]["message"]["content"]
        print(f"{task.length} bytes, key {task.key} at {task.depth:.0%}: {text!r}")


if __name__ == "__main__":
    main()
