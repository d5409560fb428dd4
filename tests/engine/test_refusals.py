"""What cannot work is refused before any weight is loaded, with the place and the cure."""

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import write_hf_twin, write_mamba2_original

from vllm_longmamba.engine.refusals import refuse_unsupported
from vllm_longmamba.tables import ThresholdTable, save_table

from .conftest import longmamba
from .harness import Engine

pytestmark = pytest.mark.engine

Tables = Callable[[str], tuple[Path, Any]]


@pytest.fixture(autouse=True)
def _nothing_is_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No weight is read, and the user's cache is an empty one."""
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    def load_model(*_: Any, **__: Any) -> None:
        pytest.fail("vLLM began to load the model")

    monkeypatch.setattr(BaseModelLoader, "load_model", load_model)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def refusal(model: Path, **engine_args: Any) -> str:
    """The message with which the engine refuses to start."""
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the callers check the message
        Engine(model, **engine_args)
    return str(error.value)


def options(**given: Any) -> dict[str, Any]:
    return {"model_impl": "longmamba", "additional_config": {"longmamba": given}}


@pytest.mark.parametrize("off", [False, "off"])
def test_no_table(off: Any, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    model = tiny_model("mamba2")
    message = refusal(model, **options(calibrate=off, train_length=96))
    assert f"no threshold table for {str(model)!r}" in message
    assert str(tmp_path / "cache" / "vllm_longmamba") in message
    assert "the engine makes none: the option calibrate is off" in message
    assert f"make one with `longmamba calibrate {model}`" in message
    assert """--additional-config '{"longmamba": {"filter": false}}'""" in message


def test_no_table_of_dummy_weights(tiny_model: Callable[[str], Path]) -> None:
    message = refusal(tiny_model("mamba2"), **options(calibrate=False, train_length=96), load_format="dummy")
    assert "no threshold table for" in message
    assert '{"longmamba": {"filter": false}}' in message


def test_unknown_training_length(tiny_model: Callable[[str], Path]) -> None:
    message = refusal(tiny_model("mamba2"), **options())
    assert "the training length of this 'mamba2' model is not known" in message
    assert """--additional-config '{"longmamba": {"train_length": N}}'""" in message


def test_too_little_text(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("too short")
    message = refusal(tiny_model("mamba2"), **options(train_length=96, calibration_text=str(text)))
    assert "calibration takes 5 sequences of 96 tokens, but text.txt (blake3" in message
    assert "has only 9 characters" in message


def test_missing_table(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    message = refusal(tiny_model("mamba2"), **longmamba(tmp_path / "gone.safetensors"))
    assert (
        f"{tmp_path / 'gone.safetensors'}: there is no such file; make a new one with `longmamba calibrate" in message
    )


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_table_of_another_model(family: str, tiny_model: Callable[[str], Path], tiny_table: Tables) -> None:
    path, table = tiny_table({"mamba1": "mamba2", "mamba2": "mamba1"}[family])
    message = refusal(tiny_model(family), **longmamba(path))
    assert f"{path}: this table was made for 'test' with weights {table.metadata.weights_fingerprint[:12]}" in message
    assert "make a table for them with `longmamba calibrate`" in message


def test_table_of_the_same_shape_but_other_weights(tiny_table: Tables, tmp_path: Path) -> None:
    model = write_mamba2_original(tmp_path / "model", seed=1)
    assert "but the weights to be loaded are" in refusal(model, **longmamba(tiny_table("mamba2")[0]))


def test_table_of_another_model_beside_the_weights(tiny_table: Tables, tmp_path: Path) -> None:
    model = write_mamba2_original(tmp_path / "model", seed=1)
    shutil.copyfile(tiny_table("mamba2")[0], model / "longmamba.safetensors")
    message = refusal(model, **options())
    assert f"{model / 'longmamba.safetensors'}: this table was made for 'test'" in message


@pytest.mark.parametrize("damage", ["no table at all", "cut short", "cut tensors", "other version", "one bit"])
def test_corrupt_table(damage: str, tiny_model: Callable[[str], Path], tiny_table: Tables, tmp_path: Path) -> None:
    content = tiny_table("mamba2")[0].read_bytes()
    damaged = {
        "no table at all": b"hello",
        "cut short": content[:100],
        "cut tensors": content[:-10],
        "other version": content.replace(b'\\"format_version\\": 3', b'\\"format_version\\": 1'),
        "one bit": content[:-1] + bytes([content[-1] ^ 1]),
    }[damage]
    assert damaged != content
    path = tmp_path / "table.safetensors"
    path.write_bytes(damaged)
    message = refusal(tiny_model("mamba2"), **longmamba(path))
    assert f"threshold table {path}: " in message
    reasons = {"other version": "format version 1, this release reads 3", "one bit": "do not have its checksum"}
    assert reasons.get(damage, "no safetensors file, or a truncated one") in message
    assert "make a new one with `longmamba calibrate" in message


def test_training_length_of_another_model(tiny_model: Callable[[str], Path], tiny_table: Tables) -> None:
    path, table = tiny_table("mamba2")
    message = refusal(tiny_model("mamba2"), **longmamba(path, train_length=2048))
    assert f"for a training length of {table.metadata.train_length} tokens" in message
    assert "leave the option out or calibrate again" in message


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"tabel": "x"}, "unknown option tabel; known are table, min_retention, train_length, filter, filter_gen"),
        ({"calibrate": "maybe"}, """calibrate must be true or false ("on" or "off"), but is 'maybe'"""),
        ({"filter": "no"}, "filter must be true or false, but is 'no'"),
        ({"min_retention": 2}, "min_retention must be a number between 0 and 1, but is 2"),
        ({"unfiltered_end": -5}, "unfiltered_end must be a number of tokens, 0 to 1073741824, but is -5"),
        (
            {"unfiltered_end": 5, "filter_generated": True},
            "unfiltered_end must be 0 or left out where filter_generated is on, but is 5",
        ),
        ({"table": 7}, "table must be the path of a .safetensors file, but is 7"),
        (
            {"table": "~nouser/x"},
            "table must be a path in a home folder that exists; write it out in full, but is '~no",
        ),
        (
            {"train_length": 96, "calibration_text": "~nouser/x"},
            "calibration_text must be a path in a home folder that exists; write it out in full, but is '~nouser/x'",
        ),
        ({"train_length": 10**30}, "train_length must be a number of tokens, 2 to 1073741824, but is 1000000"),
    ],
    ids=["unknown", "calibrate", "filter", "min_retention", "end", "both", "table", "home", "text", "train_length"],
)
def test_options(given: dict[str, Any], expected: str, tiny_model: Callable[[str], Path]) -> None:
    assert f"additional_config['longmamba']: {expected}" in refusal(tiny_model("mamba2"), **options(**given))


def test_the_plan_of_an_engine_as_an_option(tiny_model: Callable[[str], Path]) -> None:
    given = {"model_impl": "longmamba", "additional_config": {"longmamba_calibration": 5}}
    message = refusal(tiny_model("mamba2"), **given)
    assert "additional_config['longmamba_calibration'] is set by vllm_longmamba itself" in message
    assert "leave it out, and set options in additional_config['longmamba']" in message


def test_more_rows_than_a_table_has(tiny_model: Callable[[str], Path]) -> None:
    message = refusal(tiny_model("mamba2"), **options(train_length=2), max_model_len=10**9)
    assert "a table must have at most 131072 rows, got a row every 1 tokens" in message
    assert "check the training length, or take shorter prompts (--max-model-len)" in message


def test_a_user_without_a_home(tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    message = refusal(tiny_model("mamba2"), **options(train_length=96))
    assert "this user has no home; set HOME or XDG_CACHE_HOME" in message


def test_unfiltered_end_of_the_table_and_filtered_answers(
    tiny_model: Callable[[str], Path], tiny_table: Tables, tmp_path: Path
) -> None:
    _, table = tiny_table("mamba2")
    path = tmp_path / "table.safetensors"
    metadata = replace(table.metadata, unfiltered_end=64)
    save_table(ThresholdTable(metadata, table.row_lengths, table.layers), path)
    message = refusal(tiny_model("mamba2"), **longmamba(path, filter_generated=True))
    assert "the last 64 tokens of prompts are not to be filtered" in message
    assert "`longmamba calibrate --unfiltered-end 0`" in message


def test_unsupported_architecture(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=4096,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    message = refusal(tmp_path, **options(filter=False))
    assert "architecture LlamaForCausalLM has no LongMamba variant" in message
    for name in ("MambaForCausalLM", "FalconMambaForCausalLM", "Mamba2ForCausalLM", "Zamba2ForCausalLM"):
        assert name in message.partition("Supported are")[2]
    assert "Leave --model-impl out" in message


def test_original_checkpoint_without_the_flag(tiny_model: Callable[[str], Path]) -> None:
    message = refusal(tiny_model("mamba2"))
    assert f"{str(tiny_model('mamba2'))!r} is an original state-spaces checkpoint" in message
    assert "add --model-impl longmamba" in message


def test_original_checkpoint_with_an_option_that_vllm_lacks(tmp_path: Path) -> None:
    model = write_mamba2_original(tmp_path / "model", n_layer=1)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"attn_layer_idx": [0]}))
    message = refusal(model, **options(filter=False))
    assert "config.json: attn_layer_idx must be []" in message


@pytest.mark.parametrize("family", ["mamba2", "twin", "zamba2", "granite_hybrid", "falcon_h1", "nemotron_h"])
def test_a_model_whose_dt_has_bounds(family: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """vLLM would run it without the bounds; the original format and all of Hugging Face's are refused alike."""
    model, name = tmp_path / "model", "time_step_limit"
    if family == "twin":
        write_hf_twin(tiny_model("mamba2"), model)
    else:
        shutil.copytree(tiny_model(family), model)
    config = json.loads((model / "config.json").read_text())
    if family == "mamba2":
        config["ssm_cfg"]["dt_limit"], name = [0.0, 0.1], "ssm_cfg.dt_limit"
    else:
        config[name] = [0.0, 0.1]
    (model / "config.json").write_text(json.dumps(config))
    message = refusal(model, **options(filter=False))
    assert f"config.json: {name} must be [0, infinity], because vLLM's Mamba layers do not clamp dt" in message
    assert "but is [0.0, 0.1]" in message.replace("(0.0, 0.1)", "[0.0, 0.1]")


def test_weights_that_unpack_to_more_than_their_file(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    model = write_mamba2_original(tmp_path / "model")
    weights = torch.load(model / "pytorch_model.bin", weights_only=True)
    weights["backbone.norm_f.weight"] = torch.zeros(1, dtype=torch.uint8).expand(10 * 2**30)
    torch.save(weights, model / "pytorch_model.bin")
    message = refusal(model, **options(train_length=96))
    assert f"{model / 'pytorch_model.bin'}: 'backbone.norm_f.weight' must be stored in full" in message


NGRAMS = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}


@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("family", ["mamba1", "falcon_mamba", "jamba"])
def test_drafts_for_mamba1(family: str, filtered: bool, tiny_model: Callable[[str], Path], tiny_table: Tables) -> None:
    given = longmamba(tiny_table(family)[0]) if filtered else longmamba()
    message = refusal(tiny_model(family), **given, speculative_config=NGRAMS)
    assert "--model-impl longmamba does not support --speculative-config with Mamba-1 layers" in message
    assert "leave it out" in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a CPU")
def test_drafts_on_a_cpu(tiny_model: Callable[[str], Path]) -> None:
    message = refusal(tiny_model("mamba2"), **longmamba(), speculative_config=NGRAMS)
    assert "--model-impl longmamba does not support --speculative-config on a CPU: vLLM does not take" in message


@pytest.mark.parametrize(
    ("is_hybrid", "is_v2", "is_refused"), [(False, False, True), (True, False, False), (False, True, False)]
)
def test_drafts_that_model_runner_v1_does_not_count(
    is_hybrid: bool, is_v2: bool, is_refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU machine's configuration says, without one."""
    from vllm.platforms import current_platform

    monkeypatch.setattr(current_platform, "is_cpu", lambda: False)
    config = SimpleNamespace(
        speculative_config=NGRAMS,
        model_config=SimpleNamespace(architecture="LongMamba2ForCausalLM", is_hybrid=is_hybrid),
        use_v2_model_runner=is_v2,
        mamba_config=SimpleNamespace(backend=None),
        parallel_config=SimpleNamespace(enable_expert_parallel=False),
        kv_transfer_config=None,
        _post_init_kv_transfer_config=lambda: None,
    )
    with pytest.raises(ValueError, match="model runner V1") if is_refused else nullcontext():
        refuse_unsupported(config)


@pytest.mark.gpu
def test_drafts_in_model_runner_v1(tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    message = refusal(tiny_model("mamba2"), **longmamba(), speculative_config=NGRAMS)
    assert "--speculative-config in vLLM's model runner V1 for a model of Mamba layers only" in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a CPU")
@pytest.mark.parametrize("filtered", [False, True])
def test_experts_apart_on_a_cpu(filtered: bool, tiny_model: Callable[[str], Path], tiny_table: Tables) -> None:
    given = longmamba(tiny_table("jamba")[0]) if filtered else longmamba()
    message = refusal(tiny_model("jamba"), **given, tensor_parallel_size=2, enable_expert_parallel=True)
    assert "--model-impl longmamba does not support --enable-expert-parallel with more than one rank on a" in message
    assert "leave it out" in message


@pytest.mark.parametrize("filtered", [False, True])
def test_batch_invariance(
    filtered: bool, tiny_model: Callable[[str], Path], tiny_table: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    given = longmamba(tiny_table("mamba2")[0]) if filtered else longmamba()
    message = refusal(tiny_model("mamba2"), **given)
    assert "--model-impl longmamba does not support VLLM_BATCH_INVARIANT=1" in message


def test_connector_without_states(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    config = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
    config["kv_connector_extra_config"] = {"shared_storage_path": str(tmp_path)}  # type: ignore[assignment]
    message = refusal(tiny_model("mamba2"), **longmamba(), kv_transfer_config=config)
    assert "--model-impl longmamba does not support --kv-transfer-config with ExampleConnector" in message
    assert "it does not have vLLM's interface SupportsHMA" in message


def test_calibration_beside_offloading(tiny_model: Callable[[str], Path]) -> None:
    message = refusal(tiny_model("mamba2"), **options(train_length=96), kv_offloading_size=0.25)
    assert "the engine makes none: --kv-transfer-config or --kv-offloading-size would hand" in message


@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("family", ["mamba1", "jamba"])
def test_flashinfer_for_mamba1(
    family: str, filtered: bool, tiny_model: Callable[[str], Path], tiny_table: Tables
) -> None:
    given = longmamba(tiny_table(family)[0]) if filtered else longmamba()
    message = refusal(tiny_model(family), **given, mamba_backend="flashinfer")
    assert "--model-impl longmamba does not support --mamba-backend flashinfer with Mamba-1 layers" in message


def test_weights_of_a_trainer(tiny_model: Callable[[str], Path], tiny_table: Tables) -> None:
    message = refusal(
        tiny_model("mamba2"), **longmamba(tiny_table("mamba2")[0]), weight_transfer_config={"backend": "nccl"}
    )
    assert "--model-impl longmamba does not support --weight-transfer-config" in message
    assert "leave it out, or serve the plain model" in message


def test_weights_that_cannot_be_checked(tiny_model: Callable[[str], Path], tiny_table: Tables) -> None:
    message = refusal(tiny_model("mamba2"), **longmamba(tiny_table("mamba2")[0]), load_format="npcache")
    assert "cannot check the weights of --load-format npcache" in message
    assert "use auto, safetensors or pt" in message
