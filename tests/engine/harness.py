"""Runs token prompts through a real vLLM engine and compares it with the independent reference."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from references.reference_lm import reference_dt, reference_logprobs
from tiny_models import random_token_ids

from vllm_longmamba.checkpoint.fingerprint import weights_fingerprint
from vllm_longmamba.tables import LayerThresholds, TableMetadata, ThresholdTable, save_table

TRAIN_LENGTH = 96
ROW_LENGTHS = [TRAIN_LENGTH, 128, 192, 256, 400, 800]

# Largest difference of a log-probability between the float32 engine and the float64 reference. On a CPU it is the bound
# of the exactness contract: rounding gives about 1e-4, a prompt cut or filtered wrongly over 1e-2. On a GPU, dt differs
# by up to 1e-5, so that one token in some 1e5 falls on the other side of a threshold; 1.5e-3 was seen.
LOGPROB_TOLERANCE = 3e-3 if torch.cuda.is_available() else 1e-3

# How far float32 moves a dt from its threshold, relative to it: mostly by 1e-6, rarely by 1e-5.
THRESHOLD_SHIFTS = (0.0, 1e-6, -1e-6, 3e-6, -3e-6, 1e-5, -1e-5)


# Given a size, vLLM does not measure the memory, which other tests on the same GPU would disturb.
MEMORY: dict[str, Any] = {"gpu_memory_utilization": 0.3}
if torch.cuda.is_available():
    MEMORY["kv_cache_memory_bytes"] = 2**30

# Compiling takes longer than a calibration; that the compiled engine makes the same table tests
# test_calibrate_at_start.py.
EAGER: dict[str, Any] = {"enforce_eager": True, **MEMORY}


Filters = Mapping[int, torch.Tensor]


@dataclass(frozen=True)
class Completion:
    """What the engine generated for one prompt: the tokens, and (tokens, vocabulary) log-probabilities."""

    tokens: list[int]
    logprobs: np.ndarray
    cached_tokens: int


class Engine:
    """A vLLM engine in this process. Keyword arguments are vLLM's own."""

    def __init__(self, model: Path, **engine_args: Any) -> None:
        from vllm import LLM

        arguments = {
            "dtype": "float32",
            "enforce_eager": True,
            "enable_prefix_caching": False,
            "max_model_len": 2048,
            "max_num_seqs": 16,
            "num_gpu_blocks_override": 256,
            "max_logprobs": -1,
            "skip_tokenizer_init": True,
            **MEMORY,
            "gpu_memory_utilization": 0.1,
        }
        self.model = model
        self.llm = LLM(str(model), **(arguments | engine_args))

    def generate(self, prompts: Sequence[list[int]], max_tokens: int = 6) -> list[Completion]:
        """Greedy continuation of the prompts, all in one batch."""
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = self.llm.generate(inputs, sampling(max_tokens), use_tqdm=False)
        return [completion(output) for output in outputs]

    def close(self) -> None:
        """Free the engine; another one can be started afterwards."""
        self.llm.llm_engine.engine_core.shutdown()


def sampling(max_tokens: int) -> Any:
    """Greedy, with the log-probabilities of the whole vocabulary."""
    from vllm import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=max_tokens, logprobs=-1, ignore_eos=True, detokenize=False)


def completion(output: Any) -> Completion:
    """Read a vLLM `RequestOutput`."""
    chosen = output.outputs[0]
    logprobs = np.full((len(chosen.token_ids), len(chosen.logprobs[0])), -np.inf)
    for position, entries in enumerate(chosen.logprobs):
        for token, entry in entries.items():
            logprobs[position, token] = entry.logprob
    return Completion(list(chosen.token_ids), logprobs, output.num_cached_tokens or 0)


def make_table(model: Path, *, seed: int = 0) -> ThresholdTable:
    """A threshold table that filters hard: half of the channels are global, and each row filters more than the last.

    The thresholds come from the plain model's dt, so the table needs neither the engine nor our calibration.
    """
    dt = reference_dt(model, random_token_ids(400, seed=1000 + seed))
    rng = np.random.default_rng(seed)
    layers = {}
    for layer, values in dt.items():
        shares = np.linspace(0.2, 0.8, len(ROW_LENGTHS) - 1)
        thresholds = torch.stack([_between_values(values, share) for share in shares])
        unfiltered = torch.full((1, values.shape[1]), -1.0, dtype=torch.float64)
        layers[layer] = LayerThresholds(
            retention=torch.from_numpy(rng.choice([1e-6, 0.3], size=values.shape[1])),
            dt_threshold=torch.cat([unfiltered, thresholds]).float(),
        )
    metadata = TableMetadata(
        model_id="test",
        weights_fingerprint=weights_fingerprint([str(path) for path in weight_files(model)]),
        train_length=TRAIN_LENGTH,
        corpus="random tokens",
        clamp_percent=5.0,
        min_retention=1e-2,
        num_sequences=1,
        seed=seed,
        tool_version="test",
    )
    return ThresholdTable(metadata=metadata, row_lengths=np.array(ROW_LENGTHS), layers=layers)


def _between_values(values: torch.Tensor, share: float) -> torch.Tensor:
    """(channels,) thresholds that `share` of the (tokens, channels) values do not pass, and that none of them equals.

    In the first layer of a Mamba-2 model dt depends on the token alone, so that values repeat; float32 and float64
    would disagree on which side of a threshold they lie.
    """
    thresholds = []
    for channel in values.double().T:
        distinct = channel.unique()
        gaps = distinct.diff() / distinct[1:]
        start = int(share * (len(distinct) - 2))
        wide = start + int((gaps[start:] > 1e-4).nonzero()[0])
        thresholds.append((distinct[wide] + distinct[wide + 1]) / 2)
    return torch.stack(thresholds)


def write_table(model: Path, path: Path, *, seed: int = 0) -> ThresholdTable:
    """Make a table for a model and save it."""
    table = make_table(model, seed=seed)
    save_table(table, path)
    return table


def weight_files(model: Path) -> list[Path]:
    """The files that hold a checkpoint's weights."""
    return [
        path
        for path in sorted([*model.glob("*.safetensors"), *model.glob("*.bin")])
        if path.name != "longmamba.safetensors"
    ]


def assert_exact(
    model: Path,
    prompt: list[int],
    result: Completion,
    table: ThresholdTable | None,
    filters_generated: bool = False,
    unfiltered_end: int = 0,
) -> None:
    """Compare an engine's completion with the reference, given the same tokens."""
    filters: Filters = {}
    if table is not None:
        row = int(np.argmin(np.abs(np.array(ROW_LENGTHS) - len(prompt)))) if len(prompt) > TRAIN_LENGTH else 0
        filters = {layer: table.thresholds(layer)[row] for layer in table.layers}
    tokens = prompt + result.tokens
    filtered = len(tokens) if filters_generated else len(prompt)

    def expected(filters: Filters) -> np.ndarray:
        reference = reference_logprobs(
            model, tokens, prompt_length=filtered, filters=filters, unfiltered_end=unfiltered_end
        )
        return reference[len(prompt) - 1 : -1].numpy()

    assert_agrees(result.logprobs, expected, filters)


def filters_of(table: ThresholdTable, prompt_length: int) -> Filters:
    """What the reference is to filter a prompt by, as the table chooses the row."""
    row = table.row_of(prompt_length)
    return {layer: table.thresholds(layer)[row].double() for layer in table.layers}


def scaled(filters: Filters, factor: float) -> Filters:
    """The same with all thresholds multiplied."""
    return {layer: thresholds.double() * factor for layer, thresholds in filters.items()}


def assert_agrees(actual: np.ndarray, expected: Callable[[Filters], np.ndarray], filters: Filters) -> None:
    """Compare log-probabilities with what a reference expects of filters: layer index -> (channels,) thresholds.

    Of the 1e5 dt of a prompt, one or two nearly equal their thresholds, and float32 may put them on the other side.
    That changes log-probabilities by up to 0.1, which no tolerance could allow. A reference with thresholds shifted
    as little decides as the engine did, and then has to agree as closely as any other.
    """
    for shift in THRESHOLD_SHIFTS if filters else (0.0,):
        logprobs = expected(scaled(filters, 1 + shift))
        assert actual.shape == logprobs.shape
        if np.abs(actual - logprobs).max() <= LOGPROB_TOLERANCE:
            return
    np.testing.assert_allclose(actual, expected(filters), rtol=0, atol=LOGPROB_TOLERANCE)


def ask_default_engines(
    models: Mapping[str, Path], prompts: Sequence[list[int]], arguments: Mapping[str, Any], folder: Path
) -> dict[str, Any]:
    """Ask engines in processes of their own, as users start them; see default_engines.py.

    Args:
        models: name -> folder of a checkpoint.
        prompts: what each is asked.
        arguments: of `LLM`, beside the model.
        folder: for the files between the processes.

    Returns:
        Name -> for each prompt [token, log-probability] of the likeliest next tokens, or the error of a failed engine.
    """
    (folder / "prompts.json").write_text(json.dumps(prompts))
    command = [sys.executable, str(Path(__file__).with_name("default_engines.py")), str(folder / "out.json")]
    command += [str(folder / "prompts.json"), json.dumps(arguments), *map(str, models.values())]
    # conftest.py keeps engines in the test's process; here they are where vLLM puts them.
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    written = json.loads((folder / "out.json").read_text())
    return {name: written[str(model)] for name, model in models.items()}


def selected_parameters(request: Any, name: str) -> list[Any]:
    """The values of a parameter that the tests of the asking file have in this run."""
    items = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    return [item.callspec.params[name] for item in items]
