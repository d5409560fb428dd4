"""An imported table in the real engine: prompts are filtered as the released files' thresholds say."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from references.reference_lm import reference_dt, reference_logprobs
from tiny_models import random_token_ids

from vllm_longmamba.calibration.released_files import ReleaseSettings, import_table
from vllm_longmamba.checkpoint.shapes import open_model
from vllm_longmamba.tables import save_table

from .conftest import longmamba
from .harness import LOGPROB_TOLERANCE, _between_values

pytestmark = pytest.mark.engine

MIN_RETENTION = 1e-3


def write_release(model: Path, folder: Path) -> dict[str, list[torch.Tensor]]:
    """Files as the authors' scripts write them, from the model's own dt; returns what they hold, by kind or key."""
    dt = reference_dt(model, random_token_ids(3000, seed=7))
    released: dict[str, list[torch.Tensor]] = {"tA_prod": [], "3k": [], "4k": []}
    for name in ("tA_prod", "delta_t-thre"):
        (folder / name).mkdir(parents=True)
    for layer, values in dt.items():
        channels = values.shape[1]
        retention = torch.where(torch.arange(channels) % 3 == 0, 1e-12, 0.2)
        zeros = torch.zeros(channels)
        thresholds = {"1k": zeros, "2k": zeros} | {
            key: _between_values(values, share).float() for key, share in (("3k", 0.4), ("4k", 0.7))
        }
        torch.save(retention, folder / "tA_prod" / f"tA_prod_layer_{layer}.pt")
        torch.save(thresholds, folder / "delta_t-thre" / f"delta_t-thre_layer_{layer}.pt")
        released["tA_prod"].append(retention)
        for key in ("3k", "4k"):
            released[key].append(thresholds[key])
    return released


def test_filters_as_the_files_say(
    tiny_model: Callable[[str], Path], engine: Callable[..., Any], tmp_path: Path
) -> None:
    model = tiny_model("mamba2")
    released = write_release(model, tmp_path / "released")
    settings = ReleaseSettings(train_length=2000, min_retention=MIN_RETENTION)
    save_table(import_table(tmp_path / "released", open_model(str(model)), settings), tmp_path / "table.safetensors")

    prompts = [random_token_ids(length, seed=length) for length in (2300, 2700, 3700)]
    running = engine(model, **longmamba(tmp_path / "table.safetensors"), max_model_len=4096)
    for prompt, key, completion in zip(prompts, (None, "3k", "4k"), running.generate(prompts, 3), strict=True):
        filters = (
            {
                layer: torch.where(retention > MIN_RETENTION, threshold, -1.0)
                for layer, (retention, threshold) in enumerate(zip(released["tA_prod"], released[key], strict=True))
            }
            if key
            else {}
        )
        tokens = prompt + completion.tokens
        expected = reference_logprobs(model, tokens, prompt_length=len(prompt), filters=filters)
        np.testing.assert_allclose(
            completion.logprobs, expected[len(prompt) - 1 : -1].numpy(), rtol=0, atol=LOGPROB_TOLERANCE
        )
        if key:
            plain = reference_logprobs(model, tokens, prompt_length=len(prompt))
            assert (plain - expected)[len(prompt) - 1 : -1].abs().max() > 10 * LOGPROB_TOLERANCE
