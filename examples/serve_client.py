"""Asks a running LongMamba server with the OpenAI client.

vllm serve examples/passkey-mamba2-4m --model-impl longmamba --dtype float32 --max-model-len 16384 --max-num-seqs 32
python examples/serve_client.py [--base-url http://localhost:8000/v1] [--length 4096]
"""

import argparse

from openai import OpenAI
from passkey import KEY_DIGITS, passkey_tasks, read_haystack


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--base-url", default="http://localhost:8000/v1", help="address of the server [%(default)s]")
    parser.add_argument("--length", type=int, default=4096, help="bytes of the prompt [%(default)s]")
    options = parser.parse_args()
    client = OpenAI(base_url=options.base_url, api_key="none")
    model = client.models.list().data[0].id
    for task in passkey_tasks(read_haystack(), [options.length], depths=[0.1, 0.5, 0.9]):
        completion = client.completions.create(model=model, prompt=task.prompt, max_tokens=KEY_DIGITS, temperature=0.0)
        print(f"{task.length} bytes, key {task.key} at {task.depth:.0%}: {completion.choices[0].text!r}")


if __name__ == "__main__":
    main()
