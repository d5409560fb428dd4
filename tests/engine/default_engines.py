"""Starts engines exactly as users do, one after the other: nothing but the model and the method is named.

    python default_engines.py OUTPUT.json PROMPTS.json ARGUMENTS MODEL...

ARGUMENTS is JSON, what `LLM` is called with beside the model.

Writes, for each model, the tokens and log-probabilities (rows of [token, log-probability]) of one generated token for
each prompt, or the error that stopped the engine.
"""

import json
import sys
import traceback
from pathlib import Path
from typing import Any


def first_tokens(model: str, prompts: list[list[int]], arguments: dict[str, Any]) -> list[list[list[float]]]:
    """For each prompt the log-probabilities of the 20 likeliest next tokens."""
    from vllm import LLM, SamplingParams

    llm = LLM(model, **arguments)
    inputs: list[Any] = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = llm.generate(inputs, SamplingParams(temperature=0.0, max_tokens=1, logprobs=20), use_tqdm=False)
    llm.llm_engine.engine_core.shutdown()
    return [[[token, entry.logprob] for token, entry in output.outputs[0].logprobs[0].items()] for output in outputs]


def main() -> None:
    """See the module."""
    output, prompts, arguments, *models = sys.argv[1:]
    results: dict[str, Any] = {}
    for model in models:
        try:
            results[model] = first_tokens(model, json.loads(Path(prompts).read_text()), json.loads(arguments))
        except Exception:
            results[model] = traceback.format_exc()
        Path(output).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
