#!/usr/bin/env bash
# Summarizes a folder of books, asks a question about each, and goes on where a job was stopped. From the repository's root:
#
#     bash examples/summarize_folder.sh
#
# The example model finds pass keys; its prose is a tiny model's. Writes out/summaries.jsonl and out/keys.jsonl.
set -euo pipefail
export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1}
model=(--model examples/passkey-mamba2-4m --dtype float32 --max-model-len 16384 --engine-args '{"max_num_seqs": 16}')
books='examples/texts/*.txt'
mkdir -p out

# What is there, and what will not fit? This starts no engine.
longmamba summarize "$books" -o out/summaries.jsonl "${model[@]}" --dry-run

# The first document only: longer than 16384 tokens, so its sections are summarized, and then their summaries.
longmamba summarize "$books" -o out/summaries.jsonl "${model[@]}" --fit map-reduce --max-tokens 64 --limit 1

# The same command without the limit goes on where that ended.
longmamba summarize "$books" -o out/summaries.jsonl "${model[@]}" --fit map-reduce --max-tokens 64

# Not a summary but an answer, from documents in JSON lines on standard input.
python - <<'PYTHON' | longmamba summarize - -o out/keys.jsonl "${model[@]}" --max-tokens 5 \
    --instruction 'What is the pass key? The pass key is '
import json
import sys

sys.path.insert(0, "examples")
from passkey import QUESTION, passkey_tasks, read_haystack

for number, task in enumerate(passkey_tasks(read_haystack(), [500, 2000], [0.2, 0.8])):
    print(json.dumps({"id": f"{number}, key {task.key}", "text": task.prompt.removesuffix(QUESTION)}))
PYTHON
cat out/keys.jsonl
