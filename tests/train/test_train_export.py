"""What examples/train writes is what it trained, read by independent implementations."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from references.reference_lm import reference_logprobs
from safetensors.torch import load_file
from tiny_models import random_token_ids, write_mamba1_original, write_mamba2_original, write_zamba2
from torch import nn
from train.corpus import Corpus
from train.export import export_model
from train.settings import FAMILIES, Settings, family_settings
from train.training import make_model
from transformers import AutoTokenizer

TINY: dict[str, Any] = {"d_model": 64, "n_layer": 4, "headdim": 16, "steps": 1}
HYBRID: dict[str, Any] = {"hybrid_layers": (1, 3), "attention_heads": 4, "mlp_width": 48}
TOKENS = 75
VOCABULARY = 272
# float32 on both sides, in different orders; logprobs are about -6
TOLERANCE = 1e-4


def tiny_settings(family: str, **changes: Any) -> Settings:
    sizes = {"d_state": 16} if family == "mamba1" else {"d_state": 24}
    return family_settings(family, VOCABULARY, **TINY | sizes | (HYBRID if family == "zamba2" else {}) | changes)


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
def test_exported_model_is_the_trained_one(family: str, corpus: Corpus, tmp_path: Path) -> None:
    model = tiny_model(family).eval()
    export_model(model, tiny_settings(family), corpus.tokenizer, tmp_path, dtype=torch.float32)
    token_ids = random_token_ids(TOKENS)
    with torch.no_grad():
        ours = model(torch.tensor([token_ids]), torch.zeros(TOKENS, dtype=torch.int32))[0].log_softmax(-1)
    theirs = reference_logprobs(tmp_path, token_ids, prompt_length=0, dtype=torch.float32)
    assert ours.std() > 0.3
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_format_is_that_of_the_family(family: str, corpus: Corpus, tmp_path: Path) -> None:
    export_model(tiny_model(family), tiny_settings(family), corpus.tokenizer, tmp_path / "ours")
    if family == "zamba2":
        # Theirs has two shared blocks with adapters in the attention, and another layout of layers.
        theirs = write_zamba2(tmp_path / "theirs")
        names = {name for name in read_weights(tmp_path / "ours") if "layers.1." in name}
        expected = {name for name in read_weights(theirs) if "layers.1." in name and "linear_" not in name}
        expected = {name.replace("adapter_list.2.", "adapter_list.1.") for name in expected}
        assert names == expected
    else:
        write = write_mamba1_original if family == "mamba1" else write_mamba2_original
        sizes = {} if family == "mamba1" else {"d_state": 24, "headdim": 16}
        theirs = write(tmp_path / "theirs", n_layer=4, d_model=64, vocab_size=VOCABULARY, **sizes)
        ours, expected = read_weights(tmp_path / "ours"), read_weights(theirs)
        shapes = {name: tuple(weight.shape) for name, weight in expected.items() if "layers." in name}
        assert {name: tuple(ours[name].shape) for name in shapes} == shapes
        assert set(ours) == set(expected)
        assert ours["lm_head.weight"].data_ptr() == ours["backbone.embedding.weight"].data_ptr()
        config, reference = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "ours", theirs))
        reference["ssm_cfg"].pop("chunk_size", None)  # published configs leave the default out
        assert config == reference | {"pad_vocab_size_multiple": 8}
    assert read_weights(tmp_path / "ours")[_matrix(family)].dtype == torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert tokenizer("is 48213.").input_ids == corpus.tokenizer.encode("is 48213.").ids
    assert tokenizer.eos_token_id == 0


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    if (path / "model.safetensors").exists():
        return load_file(path / "model.safetensors")
    weights: dict[str, torch.Tensor] = torch.load(path / "pytorch_model.bin", weights_only=True)
    return weights


def _matrix(family: str) -> str:
    return "model.layers.0.mamba.in_proj.weight" if family == "zamba2" else "backbone.layers.0.mixer.in_proj.weight"


@pytest.mark.parametrize(
    ("family", "writer", "name"),
    [("mamba2", "torch.save", "pytorch_model.bin"), ("zamba2", "train.export.save_file", "model.safetensors")],
)
def test_a_failed_export_leaves_the_weights_that_were_there(
    family: str, writer: str, name: str, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tiny_settings(family)
    model = make_model(settings)
    before = export_model(model, settings, corpus.tokenizer, tmp_path).read_bytes()
    files = sorted(tmp_path.iterdir())

    def full(weights: object, path: Path, **_: object) -> None:
        path.write_bytes(b"a part")
        raise OSError("No space left on device")

    monkeypatch.setattr(writer, full)
    with pytest.raises(OSError, match="No space left"):
        export_model(model, settings, corpus.tokenizer, tmp_path)
    assert (tmp_path / name).read_bytes() == before
    assert sorted(tmp_path.iterdir()) == files
