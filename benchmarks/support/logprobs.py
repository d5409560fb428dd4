"""How far log-probabilities of the engine and of the torch reference are apart, on random prompts."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vllm_longmamba.evaluate.statistics import Floats

# For those who import this: torch_models, the torch reference.
sys.path.append(str(Path(__file__).resolve().parents[2] / "tests" / "references"))


def random_prompts(folder: Path, number: int, shortest: int, longest: int, seed: int) -> list[list[int]]:
    """Prompts of random tokens of a checkpoint's vocabulary; their lengths are spread evenly on a logarithmic scale."""
    config = json.loads((folder / "config.json").read_text())
    rng = np.random.default_rng(seed)
    lengths = np.geomspace(shortest, longest, number).round().astype(int)
    return [rng.integers(0, config["vocab_size"], length).tolist() for length in lengths]


def engine_logprobs(
    folder: Path, options: dict[str, Any], prompts: Sequence[list[int]], scored: int, **engine_args: Any
) -> list[Floats]:
    """(scored,) log-probabilities of each prompt's last tokens from vLLM in float32; options are LongMamba's."""
    from vllm_longmamba.evaluate.engine import EngineContestant

    longest = max(map(len, prompts)) + 1
    arguments = {"model": str(folder), "additional_config": {"longmamba": options}, "dtype": "float32"}
    arguments |= {"enforce_eager": True, "max_model_len": longest, "gpu_memory_utilization": 0.1}
    contestant = EngineContestant(arguments | engine_args, "longmamba" if options.get("filter", True) else "plain")
    with contestant.start() as runner:
        results = dict(runner.tail_logprobs(enumerate(prompts), scored))
    gc.collect()
    return [results[number] for number in range(len(prompts))]


def torch_logprobs(model: Any, prompts: Sequence[list[int]], scored: int) -> list[Floats]:
    """The same from a `TorchModel`."""
    return [model.last_logprobs(prompt, scored).double().numpy() for prompt in prompts]


def difference(ours: Sequence[Floats], theirs: Sequence[Floats]) -> dict[str, float]:
    """Largest and mean absolute difference."""
    gaps = np.abs(np.concatenate(ours) - np.concatenate(theirs))
    return {"largest": float(gaps.max()), "mean": float(gaps.mean())}
