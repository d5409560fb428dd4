"""What examples/train writes is what it trained, read by independent implementations."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from references.reference_lm import reference_logprobs
from tiny_models import random_token_ids, write_mamba1_original, write_mamba2_original, write_zamba2
from torch import nn
from train.export import export_model, read_weights
from train.settings import CHECKPOINT_BYTES, FAMILIES, Settings, family_settings
from train.training import make_model

TINY: dict[str, Any] = {"d_model": 64, "n_layer": 4, "headdim": 16, "chunk_size": 16, "bf16": False, "compile": False}
HYBRID: dict[str, Any] = {"hybrid_layers": (1, 3), "attention_heads": 4, "mlp_width": 48}
TOKENS = 75
# float32 on both sides, in different orders; logprobs are about -6
TOLERANCE = 1e-4


def tiny_settings(family: str, **changes: Any) -> Settings:
    sizes = {"d_state": 16} if family == "mamba1" else {"d_state": 24}
    return family_settings(family, **TINY | sizes | (HYBRID if family == "zamba2" else {}) | changes)


def tiny_model(family: str) -> nn.Module:
    """Weights of a size at which every one of them matters."""
    model = make_model(tiny_settings(family))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        scale = 10.0 if "embed" in name else 1.5 if parameter.dim() == 2 and "A_log" not in name else 1.0
        noise = 0.3 if parameter.dim() == 1 else 0.0
        parameter.data = scale * parameter.data + noise * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_exported_model_is_the_trained_one(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    export_model(model, tiny_settings(family), tmp_path, dtype=torch.float32)
    token_ids = random_token_ids(TOKENS)
    with torch.no_grad():
        ours = model(torch.tensor([token_ids]))[0].log_softmax(-1)
    theirs = reference_logprobs(tmp_path, token_ids, prompt_length=0, dtype=torch.float32)
    assert ours.std() > 0.3
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_training_goes_on_from_a_checkpoint(family: str, tmp_path: Path) -> None:
    model, settings = tiny_model(family), tiny_settings(family, start=str(tmp_path), seed=5)
    export_model(model, settings, tmp_path, dtype=torch.float32)
    started = make_model(settings).state_dict()
    assert all(torch.equal(started[name], weight) for name, weight in model.state_dict().items())
    with pytest.raises(RuntimeError, match="size mismatch"):
        make_model(tiny_settings(family, start=str(tmp_path), d_model=32))


@pytest.mark.parametrize("family", FAMILIES)
def test_format_is_that_of_the_family(family: str, tmp_path: Path) -> None:
    export_model(tiny_model(family), tiny_settings(family, n_layer=4), tmp_path / "ours")
    if family == "zamba2":
        # Theirs has two shared blocks with adapters in the attention, and another layout of layers.
        theirs = write_zamba2(tmp_path / "theirs")
        names = {name for name in read_weights(tmp_path / "ours") if "layers.1." in name}
        expected = {name for name in read_weights(theirs) if "layers.1." in name and "linear_" not in name}
        expected = {name.replace("adapter_list.2.", "adapter_list.1.") for name in expected}
        assert names == expected
    else:
        write = write_mamba1_original if family == "mamba1" else write_mamba2_original
        sizes = {} if family == "mamba1" else {"d_state": 24, "headdim": 16, "chunk_size": 16}
        theirs = write(tmp_path / "theirs", n_layer=4, d_model=64, vocab_size=264, **sizes)
        ours, expected = read_weights(tmp_path / "ours"), read_weights(theirs)
        # theirs pads the vocabulary of a Mamba-2 to a multiple of 16
        shapes = {name: tuple(weight.shape) for name, weight in expected.items() if "layers." in name}
        assert {name: tuple(ours[name].shape) for name in shapes} == shapes
        assert set(ours) == set(expected)
        assert ours["lm_head.weight"].data_ptr() == ours["backbone.embedding.weight"].data_ptr()
        config, reference = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "ours", theirs))
        assert config == reference | {"pad_vocab_size_multiple": 8}
    assert read_weights(tmp_path / "ours")[_matrix(family)].dtype == torch.bfloat16
    assert (tmp_path / "ours" / "tokenizer.json").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_reference_models_fit_into_the_repository(family: str, tmp_path: Path) -> None:
    settings = family_settings(family)
    file = export_model(make_model(settings), settings, tmp_path)
    assert 6_000_000 < file.stat().st_size <= CHECKPOINT_BYTES


def test_example_model_has_the_format_of_the_recipe(tmp_path: Path) -> None:
    """examples/passkey-mamba2-4m came of an earlier version of this recipe."""
    settings = family_settings("mamba2")
    export_model(make_model(settings), settings, tmp_path)
    example = Path(__file__).resolve().parents[2] / "examples" / "passkey-mamba2-4m"
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads((example / "config.json").read_text())
    expected = {name: (weight.shape, weight.dtype) for name, weight in read_weights(example).items()}
    assert {name: (weight.shape, weight.dtype) for name, weight in read_weights(tmp_path).items()} == expected


def test_too_large_a_model_is_refused(tmp_path: Path) -> None:
    settings = family_settings("mamba2", n_layer=9)
    with pytest.raises(ValueError, match="at most 8000000 bytes"):
        export_model(make_model(settings), settings, tmp_path)


def test_attention_window() -> None:
    """A window as long as the text changes nothing; a short one cuts off what lies before it."""
    model, tokens = tiny_model("zamba2"), torch.tensor([random_token_ids(TOKENS)])
    with torch.no_grad():
        everything = model(tokens)
        model.window = TOKENS
        torch.testing.assert_close(model(tokens), everything, atol=1e-4, rtol=1e-4)
        model.window = 4
        short = model(tokens)
    torch.testing.assert_close(short[:, :4], everything[:, :4], atol=1e-4, rtol=1e-4)
    assert (short[:, 8:] - everything[:, 8:]).abs().mean() > 1e-3


def _matrix(family: str) -> str:
    return "model.layers.0.mamba.in_proj.weight" if family == "zamba2" else "backbone.layers.0.mixer.in_proj.weight"
