"""Checkpoints as people publish them: the original format, the defaults that vLLM lacks for it, long contexts."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import (
    MAX_POSITIONS,
    random_token_ids,
    write_hf_twin,
    write_jamba,
    write_mamba1_original,
    write_mamba2_original,
)

from .conftest import longmamba
from .harness import Completion, assert_exact

pytestmark = pytest.mark.engine

LONGMAMBA = {"model_impl": "longmamba"}
WRITERS: dict[str, Callable[..., Path]] = {"mamba1": write_mamba1_original, "mamba2": write_mamba2_original}
PROMPTS = [random_token_ids(length, seed=length) for length in (3, 161, 400)]

# The same weights through the same kernels: nothing but the names in the files differs.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def twin(
    tiny_model: Callable[[str], Path],
    tiny_table: Callable[[str], Any],
    engine: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], list[Completion]]:
    """Function: family -> what its Hugging Face format twin generates, with the filter on."""
    made: dict[str, list[Completion]] = {}

    def completions(family: str) -> list[Completion]:
        if family not in made:
            folder = write_hf_twin(tiny_model(family), tmp_path_factory.mktemp("twins") / family)
            path, table = tiny_table(family)
            made[family] = engine(folder, **longmamba(path)).generate(PROMPTS)
            for prompt, completion in zip(PROMPTS, made[family], strict=True):
                assert_exact(tiny_model(family), prompt, completion, table)
        return made[family]

    return completions


@pytest.mark.parametrize(
    ("safetensors", "table_beside"), [(False, False), (True, True)], ids=["bin, option", "safetensors, table beside"]
)
@pytest.mark.parametrize("family", WRITERS)
def test_original_checkpoint_is_its_twin(
    family: str,
    safetensors: bool,
    table_beside: bool,
    twin: Callable[[str], list[Completion]],
    tiny_table: Callable[[str], Any],
    engine: Callable[..., Any],
    tmp_path: Path,
) -> None:
    expected = twin(family)
    folder = WRITERS[family](tmp_path / family, safetensors=safetensors)
    path, _ = tiny_table(family)
    if table_beside:
        shutil.copyfile(path, folder / "longmamba.safetensors")
    arguments = LONGMAMBA if table_beside else longmamba(path)
    for completion, other in zip(engine(folder, **arguments).generate(PROMPTS), expected, strict=True):
        assert completion.tokens == other.tokens
        assert abs(completion.logprobs - other.logprobs).max() < TOLERANCE


def test_tied_head_that_vllm_does_not_tie(engine: Callable[..., Any], tmp_path: Path) -> None:
    """Jamba's stock class would leave the head empty, and answer NaN."""
    folder = write_jamba(tmp_path / "tied", tied=True)
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        assert "lm_head.weight" not in weights.keys()  # noqa: SIM118 - not a dict
    for prompt, completion in zip(PROMPTS, engine(folder, **longmamba()).generate(PROMPTS), strict=True):
        assert_exact(folder, prompt, completion, None)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.0.mamba.A_log", "model.layers.2.mamba.D"])
def test_checkpoint_without_one_weight(name: str, engine: Callable[..., Any], tmp_path: Path) -> None:
    folder = write_jamba(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights[name]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    shown = name.replace("A_log", "A")
    with pytest.raises(ValueError, match=f"must hold every weight of the model, but has none for {shown}; check that"):
        engine(folder, **longmamba())


@pytest.fixture
def model_config(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Function: (folder, arguments of `EngineArgs`) -> vLLM's `ModelConfig`. Whoever asks the network fails."""
    import socket

    def connect(*_: Any, **__: Any) -> None:
        pytest.fail("something asked the network")

    monkeypatch.setattr(socket.socket, "connect", connect)

    def make(folder: Path, **engine_args: Any) -> Any:
        from vllm.engine.arg_utils import EngineArgs

        return EngineArgs(model=str(folder), dtype="float32", **(LONGMAMBA | engine_args)).create_model_config()

    return make


@pytest.mark.parametrize("family", WRITERS)
def test_tokenizer_falls_to_that_of_the_published_models(
    family: str, model_config: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = WRITERS[family](tmp_path / family, n_layer=1, tokenizer=False)
    with caplog.at_level("INFO", logger="vllm.longmamba"):
        config = model_config(folder, tokenizer_revision="of the model")
    assert (config.tokenizer, config.tokenizer_revision) == ("EleutherAI/gpt-neox-20b", None)
    (message,) = [record.getMessage() for record in caplog.records if "tokenizer" in record.getMessage()]
    assert f"{folder} has no tokenizer; using EleutherAI/gpt-neox-20b" in message
    assert "--tokenizer" in message


def test_tokenizer_of_the_user_wins(model_config: Callable[..., Any], tmp_path: Path) -> None:
    folder = write_mamba1_original(tmp_path / "model", n_layer=1, tokenizer=False)
    other = write_mamba1_original(tmp_path / "other", n_layer=1)
    assert model_config(folder, tokenizer=str(other)).tokenizer == str(other)


def test_tokenizer_of_the_checkpoint_wins(model_config: Callable[..., Any], tiny_model: Callable[[str], Path]) -> None:
    assert model_config(tiny_model("mamba2")).tokenizer == str(tiny_model("mamba2"))


def test_tokenizer_of_a_twin_stays(model_config: Callable[..., Any], tmp_path: Path) -> None:
    """Only original checkpoints are known to have been trained with that tokenizer."""
    original = write_mamba1_original(tmp_path / "original", n_layer=1, tokenizer=False)
    folder = write_hf_twin(original, tmp_path / "twin")
    assert model_config(folder).tokenizer == str(folder)


@pytest.mark.parametrize(
    ("family", "given", "expected"),
    [
        ("mamba1", None, 131072),
        ("mamba2", None, 131072),
        ("mamba1", 700, 700),
        ("mamba2", 500000, 500000),
        ("zamba2", None, 131072),
        ("zamba2", 700, 700),
        ("zamba2", MAX_POSITIONS + 1, MAX_POSITIONS + 1),
        ("zamba2", 500000, 500000),
    ],
)
def test_length(
    family: str,
    given: int | None,
    expected: int,
    model_config: Callable[..., Any],
    tiny_model: Callable[[str], Path],
) -> None:
    config = model_config(tiny_model(family), max_model_len=given)
    assert config.max_model_len == expected
    positions = getattr(config.hf_text_config, "max_position_embeddings", None)
    assert positions is None or positions >= expected
    # -1 lets vLLM shorten the default to what the memory holds; what the user gave is never shortened.
    assert config.original_max_model_len == (-1 if family == "zamba2" and given is None else given)


def test_prompt_longer_than_the_rotary_table_of_the_config(
    engine: Callable[..., Any], tiny_model: Callable[[str], Path], tiny_table: Callable[[str], Any], tmp_path: Path
) -> None:
    """The same weights with a config of 256 positions and one of 8192: the same continuation of 400 tokens."""
    path, table = tiny_table("zamba2")
    short = tmp_path / "short"
    shutil.copytree(tiny_model("zamba2"), short)
    config = (short / "config.json").read_text()
    short_config = config.replace(f'"max_position_embeddings": {MAX_POSITIONS}', '"max_position_embeddings": 256')
    assert short_config != config
    (short / "config.json").write_text(short_config)
    prompt = PROMPTS[-1]
    completion = engine(short, **longmamba(path), max_model_len=1024).generate([prompt])[0]
    assert_exact(tiny_model("zamba2"), prompt, completion, table)
