"""Completes long prompts without a server: `LLM(...).generate` with LongMamba.

    python examples/offline.py

The model was trained on sequences of 512 bytes, and is asked for a key in 2048 and 4096 bytes of text.
"""

import argparse
import os

from passkey import KEY_DIGITS, passkey_tasks, read_haystack


def main() -> None:
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    # GiB of cache on a CPU, where vLLM would take half of the memory.
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams

    tasks = passkey_tasks(read_haystack(), lengths=[2048, 4096], depths=[0.1, 0.5, 0.9])
    llm = LLM("examples/passkey-mamba2-4m", model_impl="longmamba", dtype="float32", max_num_seqs=32)
    outputs = llm.generate([task.prompt for task in tasks], SamplingParams(max_tokens=KEY_DIGITS, temperature=0.0))
    for task, output in zip(tasks, outputs, strict=True):
        print(f"{task.length} bytes, key {task.key} at {task.depth:.0%}: {output.outputs[0].text!r}")


if __name__ == "__main__":
    main()
