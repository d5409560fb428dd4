"""`longmamba inspect` of real models: what it reads of a layer is what the layer computes with."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from references.reference_lm import TimeSteps, _logprobs
from tiny_models import random_token_ids
from torch.nn import functional
from typer.testing import CliRunner

from vllm_longmamba.cli import app
from vllm_longmamba.inspect.hidden_attention import attention
from vllm_longmamba.inspect.measure import measure
from vllm_longmamba.inspect.recording import _convolve, layer_inputs
from vllm_longmamba.layers.filtered_mixer import filtered_mixers

from .conftest import longmamba
from .harness import MEMORY, TRAIN_LENGTH

pytestmark = pytest.mark.engine

# float32 engine, float64 sums over a hundred tokens.
TOLERANCE = 1e-4


def output_of(mixer: Any, hidden: torch.Tensor, mup_vector: torch.Tensor | None) -> torch.Tensor:
    """A mixer's output, from the hidden attention of its channels instead of a scan."""
    inputs = layer_inputs(mixer, hidden, mup_vector)
    queries = torch.arange(len(hidden), device=hidden.device)
    alpha = torch.stack([attention(inputs, channel, queries) for channel in range(inputs.channels)])
    projected = mixer.in_proj(hidden)[0] * (1.0 if mup_vector is None else mup_vector)
    D = mixer.D.double()
    if mixer.A.ndim == 2:
        x, z = projected.chunk(2, dim=-1)
        x = _convolve(x, mixer).double()
        y = torch.einsum("cij,jc->ic", alpha, x) + D * x
        return mixer.out_proj((y.float() * functional.silu(z)).contiguous())[0]
    gate, x_B_C, _ = projected.split([mixer.intermediate_size, mixer.conv_dim, mixer.num_heads], dim=-1)
    x = mixer.split_hidden_states_B_C_fn(_convolve(x_B_C, mixer))[0]
    x = x.reshape(len(hidden), mixer.num_heads, mixer.head_dim).double()
    y = torch.einsum("hij,jhp->ihp", alpha, x) + D[:, None] * x
    return mixer.out_proj(mixer.norm(y.float().flatten(1).contiguous(), gate.contiguous()))[0]


# Jamba normalizes dt, B and C as Falcon Mamba does.
@pytest.mark.parametrize(
    "family",
    ["mamba1", "mamba2", "falcon_mamba", pytest.param("jamba", marks=pytest.mark.slow), "falcon_h1", "nemotron_h"],
)
def test_hidden_attention_gives_the_output_of_every_layer(family: str, engine: Callable[..., Any]) -> None:
    running = engine(family, **longmamba())
    model = running.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.model
    given: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}
    differences: dict[int, tuple[float, float]] = {}

    def before(mixer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = dict(zip(("hidden_states", "second"), args, strict=False)) | kwargs
        mup_vector = arguments.get("mup_vector", arguments.get("second") if mixer.A.ndim == 1 else None)
        given[mixer.layer_index] = (arguments["hidden_states"].clone(), mup_vector)

    def after(mixer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        hidden, mup_vector = given[mixer.layer_index]
        if len(hidden) == 1:
            return
        actual = output if output is not None else kwargs.get("output", args[-1])
        expected = output_of(mixer, hidden, mup_vector)
        differences[mixer.layer_index] = (float((actual - expected).abs().max()), float(expected.abs().max()))

    mixers: list[Any] = filtered_mixers(model)
    hooks = [mixer.register_forward_pre_hook(before, with_kwargs=True) for mixer in mixers]
    hooks += [mixer.register_forward_hook(after, with_kwargs=True) for mixer in mixers]
    running.generate([random_token_ids(101, seed=3)], max_tokens=2)
    for hook in hooks:
        hook.remove()
    assert sorted(differences) == [mixer.layer_index for mixer in mixers]
    for difference, scale in differences.values():
        assert scale > 0.01
        assert difference < TOLERANCE * scale


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """400 letters: as many tokens of the byte-level tokenizer."""
    path = tmp_path / "text.txt"
    path.write_text("".join(chr(token % 96 + 32) for token in random_token_ids(400, seed=9)))
    return path


def reference_steps(model: Path, tokens: list[int], filters: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
    """dt of every layer of the plain-torch model, 0 where filtered: layer -> (tokens, channels) float64."""
    steps = TimeSteps(len(tokens), filters)
    _logprobs(model, tokens, steps, torch.float64)
    return {
        layer: dt.masked_fill(dt <= filters[layer].double(), 0.0) if filters else dt for layer, dt in steps.dt.items()
    }


def test_measure(tiny_model: Callable[[str], Path], tiny_table: Callable[[str], Any], text: Path) -> None:
    model = tiny_model("mamba1")
    path, table = tiny_table("mamba1")
    seen: list[tuple[int, bool]] = []

    def progress(passes: list[Any]) -> list[Any]:
        seen.extend(passes)
        return passes

    engine_args: dict[str, Any] = {"dtype": "float32", **MEMORY}
    measured = measure(str(model), table, path, text, None, [(1, 5)], progress=progress, **engine_args)
    assert seen == [(96, False), (192, False), (192, True), (384, False), (384, True)]
    assert sorted(measured.plain) == [TRAIN_LENGTH, 192, 384]
    assert sorted(measured.filtered) == [192, 384]

    tokens = list(text.read_bytes())
    for length, row in ((96, 0), (192, 2), (384, 4)):
        for is_filtered in (False, True) if row else (False,):
            filters = {layer: table.thresholds(layer)[row] for layer in table.layers} if is_filtered else {}
            expected = reference_steps(model, tokens[:length], filters)
            for layer, result in (measured.filtered if is_filtered else measured.plain)[length].items():
                dt = expected[layer].numpy()
                np.testing.assert_allclose(result.kept, (dt > 0).mean(0), rtol=0, atol=1e-9)
                assert sorted(result.maps) == ([5] if layer == 1 else [])
            assert measured.plain[length][1].maps[5].shape == (min(length, 256),) * 2
    is_global = table.is_global(0).numpy()
    assert (measured.filtered[384][0].kept[~is_global] == 1).all()
    assert (measured.filtered[384][0].kept[is_global] < 0.7).all()


def test_command(
    tiny_model: Callable[[str], Path], tiny_table: Callable[[str], Any], text: Path, tmp_path: Path
) -> None:
    path, _ = tiny_table("mamba2")
    command = ["inspect", str(tiny_model("mamba2")), "--table", str(path), "--text", str(text), "--dtype", "float32"]
    command += ["--lengths", "200,300", "--channel", "2:3", "-o", str(tmp_path / "pictures")]
    command += ["--engine-args", json.dumps(MEMORY)]
    result = CliRunner().invoke(app, command, env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    lines = [" ".join(line.split()) for line in result.output.splitlines()]
    assert "Measured on text.txt" in lines
    (first,) = [line for line in lines if line.startswith("200 ")]
    (second,) = [line for line in lines if line.startswith("300 ")]
    kept = [float(line.split()[1].rstrip("%")) for line in (first, second)]
    assert 0 < kept[1] < kept[0] < 100
    names = ("kept", "receptive_fields", "retention", "thresholds")
    files = sorted(f"{name}.{suffix}" for name in names for suffix in ("png", "svg"))
    assert sorted(file.name for file in (tmp_path / "pictures").iterdir()) == files
    assert "layer 2, channel 3" in (tmp_path / "pictures" / "receptive_fields.svg").read_text()
