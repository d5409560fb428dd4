"""Tests of vllm_longmamba/calibration/plan.py and of what the front end decides where a model has no table."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from calibration_plans import PAPER_PLAN as PLAN
from tiny_models import write_mamba2_original

import vllm_longmamba.tables.shipped as shipped
from vllm_longmamba.calibration.at_start import calibration_obstacle
from vllm_longmamba.calibration.plan import PLAN_KEY, CalibrationPlan, plan_from_config
from vllm_longmamba.tables import read_metadata, save_table

Configure = Callable[..., Any]


@pytest.fixture
def configure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Configure:
    """Function: options -> vLLM's configuration of a tiny model; the cache is an empty one."""
    from vllm.engine.arg_utils import EngineArgs

    # vLLM keeps its own cache: what it knows of its model classes takes seconds to find out.
    own = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    monkeypatch.setenv("VLLM_CACHE_ROOT", os.environ.get("VLLM_CACHE_ROOT", str(own / "vllm")))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(shipped, "__path__", [str(tmp_path / "none")])

    def make(model: Path | None = None, **options: Any) -> Any:
        engine = {name: options.pop(name) for name in list(options) if name in EngineArgs.__dataclass_fields__}
        folder = model or tmp_path / "model"
        if not folder.exists():
            write_mamba2_original(folder, n_layer=1, d_model=16)
        arguments = EngineArgs(
            str(folder),
            model_impl="longmamba",
            additional_config={"longmamba": options},
            **{"dtype": "float32"} | engine,
        )
        return arguments.create_engine_config()

    return make


def plan_of(config: Any) -> CalibrationPlan:
    plan = plan_from_config(config.additional_config)
    assert plan is not None
    return plan


@pytest.mark.parametrize(
    ("change", "is_another"),
    [
        ({"dtype": "bfloat16"}, True),
        ({"quantization": "fp8"}, True),
        ({"train_length": 97}, True),
        ({"max_length": 1001}, True),
        ({"num_sequences": 6}, True),
        ({"clamp_percent": 5.5}, True),
        ({"seed": 1}, True),
        ({"corpus": "a text (blake3 01)"}, True),
        ({"model_id": "renamed"}, False),
        ({"texts": ("/elsewhere/text",)}, False),
        ({"store": "/elsewhere"}, False),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_key(change: dict[str, Any], is_another: bool) -> None:
    assert (replace(PLAN, **change).key() != PLAN.key()) is is_another
    assert len(PLAN.key()) == 32


def test_plan_survives_the_config() -> None:
    from dataclasses import asdict

    plan = replace(PLAN, texts=("/a", "/b"), store="/c")
    through_json = json.loads(json.dumps({PLAN_KEY: asdict(plan)}))
    assert plan_from_config(through_json) == plan
    assert plan_from_config({}) is None
    assert plan_from_config(None) is None


def test_empty_table() -> None:
    table = PLAN.empty_table({0: 4, 7: 2})
    assert table.row_lengths.tolist() == PLAN.row_lengths.tolist()
    for layer, channels in ((0, 4), (7, 2)):
        thresholds = table.thresholds(layer)
        assert thresholds.shape == (len(PLAN.row_lengths), channels)
        assert bool((thresholds == -1.0).all())


def test_empty_table_lies_in_host_memory_while_vllm_builds_a_model_on_its_device() -> None:
    with torch.device("meta"):
        table = PLAN.empty_table({0: 2})
    assert table.layers[0].retention.device.type == table.layers[0].dt_threshold.device.type == "cpu"


@pytest.mark.parametrize(("max_model_len", "expected"), [(96, False), (100, False), (120, False), (121, True)])
def test_can_filter(max_model_len: int, expected: bool) -> None:
    # Rows at 96 and 144 tokens: the nearest to 120 is still the first.
    assert PLAN.can_filter(max_model_len) is expected
    assert (PLAN.empty_table({0: 1}).row_of(max_model_len) > 0) is expected


def test_plan_of_an_engine_without_a_table(configure: Configure, tmp_path: Path) -> None:
    plan = plan_of(configure(train_length=96))
    assert (plan.model_id, plan.dtype, plan.quantization, plan.train_length) == ("model", "float32", None, 96)
    assert (plan.method, plan.num_sequences, plan.clamp_percent, plan.min_retention) == ("unclamped", 5, 0.0, 0.05)
    assert plan.metadata().combine == "clipped"
    papers = plan_of(configure(train_length=96, calibration_method="paper"))
    assert (papers.method, papers.clamp_percent, papers.min_retention) == ("paper", 5.0, 0.01)
    assert papers.metadata().combine == "mean"
    assert plan.max_length == 131072
    assert plan.corpus.startswith("the sample of vllm_longmamba (blake3 ")
    name = f"{plan.weights_fingerprint[:32]}-{plan.key()}.safetensors"
    assert plan.store == str(tmp_path / "cache" / "vllm_longmamba" / name)
    assert plan_of(configure(train_length=96)) == plan


def test_store_of_other_weights_and_settings(configure: Configure, tmp_path: Path) -> None:
    """Nothing but the same weights, run the same way and calibrated alike, finds the same table."""
    text = tmp_path / "text.txt"
    text.write_text("some text, " * 200)
    other = write_mamba2_original(tmp_path / "other", n_layer=1, d_model=16, seed=1)
    stores = [
        plan_of(configure(train_length=96)).store,
        plan_of(configure(train_length=96, model=other)).store,
        plan_of(configure(train_length=90)).store,
        plan_of(configure(train_length=96, dtype="bfloat16")).store,
        plan_of(configure(train_length=96, max_model_len=200_000)).store,
        plan_of(configure(train_length=96, calibration_text=str(text))).store,
    ]
    assert len(set(stores)) == len(stores)
    # A shorter max_model_len needs no other table.
    assert plan_of(configure(train_length=96, max_model_len=5000)).store == stores[0]


def test_changed_weights_are_noticed(configure: Configure, tmp_path: Path) -> None:
    before = plan_of(configure(train_length=96))
    file = tmp_path / "model" / "pytorch_model.bin"
    weights = torch.load(file, weights_only=True)
    weights["backbone.norm_f.weight"][0] += 1e-3
    torch.save(weights, file)
    after = plan_of(configure(train_length=96))
    assert after.weights_fingerprint != before.weights_fingerprint
    assert after.store != before.store


def test_dummy_weights_are_not_stored(configure: Configure) -> None:
    plan = plan_of(configure(train_length=96, load_format="dummy"))
    assert (plan.weights_fingerprint, plan.store) == ("dummy", None)


def test_a_table_is_used_where_there_is_one(configure: Configure, tmp_path: Path) -> None:
    plan = plan_of(configure(train_length=96))
    table = PLAN.empty_table({0: 2})
    made = tmp_path / "cache" / "vllm_longmamba" / f"{plan.weights_fingerprint[:32]}.safetensors"
    made.parent.mkdir(parents=True)
    metadata = replace(table.metadata, weights_fingerprint=plan.weights_fingerprint)
    save_table(replace(table, metadata=metadata), made)
    config = configure(train_length=96)
    assert PLAN_KEY not in config.additional_config
    assert config.additional_config["longmamba"]["table"] == str(made)
    assert read_metadata(made).train_length == 96


def test_short_prompts_need_no_table(configure: Configure) -> None:
    config = configure(train_length=2000, max_model_len=2400)
    assert PLAN_KEY not in config.additional_config
    assert config.additional_config["longmamba"]["filter"] is False


def test_refusals(configure: Configure, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="and the engine makes none: the option calibrate is off"):
        configure(train_length=96, calibrate=False)
    with pytest.raises(ValueError, match="the training length of this 'mamba2' model is not known"):
        configure()
    with pytest.raises(ValueError, match=r"calibration_text cannot be read: .*gone"):
        configure(train_length=96, calibration_text=str(tmp_path / "gone"))
    text = tmp_path / "short.txt"
    text.write_text("x" * 479)
    with pytest.raises(ValueError, match=r"takes 5 sequences of 96 tokens, but short\.txt .* has only 479 characters"):
        configure(train_length=96, calibration_text=str(text))
    with pytest.raises(ValueError, match="calibration takes 5 sequences of 100000 tokens"):
        configure(train_length=100_000, max_model_len=200_000)


def engine_config(**changes: Any) -> Any:
    """What `calibration_obstacle` reads of vLLM's configuration."""
    parallel = SimpleNamespace(distributed_executor_backend="mp", data_parallel_size=1)
    config = SimpleNamespace(
        model_config=SimpleNamespace(runner_type="generate", is_moe=False),
        kv_transfer_config=None,
        parallel_config=parallel,
    )
    for path, value in changes.items():
        owner, _, name = path.rpartition("__")
        setattr(getattr(config, owner) if owner else config, name, value)
    return config


def test_calibration_obstacle() -> None:
    assert calibration_obstacle(engine_config()) is None
    moe = {"model_config__is_moe": True}
    assert calibration_obstacle(engine_config(**moe)) is None
    assert calibration_obstacle(engine_config(parallel_config__data_parallel_size=2)) is None
    for changes, expected in [
        ({"model_config__runner_type": "pooling"}, "pooling"),
        ({"kv_transfer_config": object()}, "--kv-transfer-config"),
        ({"parallel_config__distributed_executor_backend": "external_launcher"}, "external launcher"),
        ({**moe, "parallel_config__data_parallel_size": 2}, "mixture of experts"),
    ]:
        assert expected in (calibration_obstacle(engine_config(**changes)) or "")


def test_an_engine_that_cannot_calibrate_takes_what_another_stored(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import vllm_longmamba.calibration.at_start as calibrate_at_start

    plan = plan_of(configure(train_length=96))
    assert plan.store is not None
    monkeypatch.setattr(calibrate_at_start, "calibration_obstacle", lambda config: "it is told not to")
    with pytest.raises(ValueError, match="and the engine makes none: it is told not to; make one with"):
        configure(train_length=96)
    Path(plan.store).parent.mkdir(parents=True)
    save_table(plan.empty_table({0: 2}), plan.store)
    config = configure(train_length=96)
    assert config.additional_config["longmamba"]["table"] == plan.store
    assert PLAN_KEY not in config.additional_config
