"""The job on Ray Data: two replicas of the example model on a Ray cluster that is started on this machine.

    python examples/ray_summarize.py [--address ADDRESS] [--replicas N]

needs `pip install "vllm-longmamba[ray,summarize]"`. On a cluster with GPUs each replica takes one; the plugin travels
with the job, and the model's folder must be reachable from every node. Writes out/ray.jsonl.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from passkey import QUESTION, passkey_tasks, read_haystack

OUTPUT = Path("out/ray.jsonl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--address", default="local", help="of the cluster [%(default)s: starts one]")
    parser.add_argument("--replicas", type=int, default=2)
    given = parser.parse_args()
    tasks = passkey_tasks(read_haystack(), [500, 1500], [0.2, 0.5, 0.8], trials=2)
    documents = OUTPUT.with_name("ray_documents.jsonl")
    documents.parent.mkdir(exist_ok=True)
    with documents.open("w") as lines:
        for number, task in enumerate(tasks):
            lines.write(json.dumps({"id": str(number), "text": task.prompt.removesuffix(QUESTION)}) + "\n")
    longmamba = str(Path(sys.executable).with_name("longmamba"))
    job = [longmamba, "summarize", str(documents), "-o", str(OUTPUT), "--model", "examples/passkey-mamba2-4m"]
    job += [
        "--dtype",
        "float32",
        "--max-model-len",
        "4096",
        "--engine-args",
        '{"max_num_seqs": 8}',
        "--max-tokens",
        "5",
    ]
    job += ["--instruction", QUESTION.strip() + " ", "--ray", given.address, "--replicas", str(given.replicas)]
    # GiB of cache of each replica on a CPU, where vLLM would take half of the memory.
    subprocess.run(job, env={"VLLM_CPU_KVCACHE_SPACE": "1"} | os.environ, check=True)
    for row in map(json.loads, OUTPUT.read_text().splitlines()):
        print(f"{tasks[int(row['id'])].length} bytes, key {tasks[int(row['id'])].key}: {row['summary']!r}")


if __name__ == "__main__":
    main()
