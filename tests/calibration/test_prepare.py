"""Tests of vllm_longmamba/calibration/prepare.py: what the front end decides where a model has no table."""

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from calibration_settings import PAPER_SETTINGS
from tiny_models import write_mamba2_original

import vllm_longmamba.calibration.prepare as prepare
import vllm_longmamba.tables.shipped as shipped
from vllm_longmamba.calibration.prepare import calibration_obstacle
from vllm_longmamba.calibration.settings import CALIBRATION_KEY, CalibrationSettings, from_config, to_config
from vllm_longmamba.checkpoint.table_lookup import cached_table_path
from vllm_longmamba.engine.config import LongMambaModelConfig
from vllm_longmamba.options import LongMambaOptions, options_from_config
from vllm_longmamba.tables import read_metadata, save_table

Configure = Callable[..., Any]


@pytest.fixture
def configure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Configure:
    """Function: options, what a command asks for -> vLLM's configuration of a tiny model; the cache is an empty one."""
    from vllm.engine.arg_utils import EngineArgs

    # vLLM keeps its own cache: what it knows of its model classes takes seconds to find out.
    own = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    monkeypatch.setenv("VLLM_CACHE_ROOT", os.environ.get("VLLM_CACHE_ROOT", str(own / "vllm")))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(shipped, "__path__", [str(tmp_path / "none")])

    def make(model: Path | None = None, asked: list[CalibrationSettings] = [], **options: Any) -> Any:  # noqa: B006
        engine = {name: options.pop(name) for name in list(options) if name in EngineArgs.__dataclass_fields__}
        folder = model or tmp_path / "model"
        if not folder.exists():
            write_mamba2_original(folder, n_layer=1, d_model=16)
        arguments = EngineArgs(
            str(folder),
            model_impl="longmamba",
            additional_config={"longmamba": options, **(to_config(asked) if asked else {})},
            **{"dtype": "float32"} | engine,
        )
        return arguments.create_engine_config()

    return make


def planned(config: Any) -> CalibrationSettings:
    (settings,) = from_config(config.additional_config)
    return settings


def save_to_cache(fingerprint: str, unfiltered_end: int = 0) -> Path:
    """A table of some weights, as a user makes it; returns its path."""
    table = PAPER_SETTINGS.empty_table({0: 2})
    made = cached_table_path(fingerprint)
    made.parent.mkdir(parents=True, mode=0o700, exist_ok=True)
    metadata = replace(table.metadata, weights_fingerprint=fingerprint, unfiltered_end=unfiltered_end)
    save_table(replace(table, metadata=metadata), made)
    return made


def test_settings_of_an_engine_without_a_table(configure: Configure, tmp_path: Path) -> None:
    settings = planned(configure(train_length=96))
    assert (settings.model_id, settings.dtype, settings.quantization, settings.train_length) == (
        "model",
        "float32",
        None,
        96,
    )
    assert (settings.method, settings.num_sequences, settings.clamp_percent, settings.min_retention) == (
        "unclamped",
        5,
        0.0,
        0.05,
    )
    papers = planned(configure(train_length=96, calibration_method="paper"))
    assert (papers.method, papers.clamp_percent, papers.min_retention) == ("paper", 5.0, 0.01)
    assert settings.max_length == 131072
    assert settings.corpus.startswith("the sample of vllm_longmamba (blake3 ")
    name = f"{settings.weights_fingerprint[:32]}-{settings.key()}.safetensors"
    assert settings.store == str(tmp_path / "cache" / "vllm_longmamba" / name)
    assert planned(configure(train_length=96)) == settings


def test_store_of_other_weights_and_settings(configure: Configure, tmp_path: Path) -> None:
    """Nothing but the same weights, run the same way and calibrated alike, finds the same table."""
    text = tmp_path / "text.txt"
    text.write_text("some text, " * 200)
    other = write_mamba2_original(tmp_path / "other", n_layer=1, d_model=16, seed=1)
    stores = [
        planned(configure(train_length=96)).store,
        planned(configure(train_length=96, model=other)).store,
        planned(configure(train_length=90)).store,
        planned(configure(train_length=96, dtype="bfloat16")).store,
        planned(configure(train_length=96, max_model_len=200_000)).store,
        planned(configure(train_length=96, calibration_text=str(text))).store,
    ]
    assert len(set(stores)) == len(stores)
    # A shorter max_model_len needs no other table.
    assert planned(configure(train_length=96, max_model_len=5000)).store == stores[0]


def test_changed_weights_are_noticed(configure: Configure, tmp_path: Path) -> None:
    before = planned(configure(train_length=96))
    file = tmp_path / "model" / "pytorch_model.bin"
    weights = torch.load(file, weights_only=True)
    weights["backbone.norm_f.weight"][0] += 1e-3
    torch.save(weights, file)
    after = planned(configure(train_length=96))
    assert after.weights_fingerprint != before.weights_fingerprint
    assert after.store != before.store


def test_dummy_weights_are_not_stored(configure: Configure) -> None:
    settings = planned(configure(train_length=96, load_format="dummy"))
    assert (settings.weights_fingerprint, settings.store) == ("dummy", None)


def test_a_table_is_used_where_there_is_one(configure: Configure, tmp_path: Path) -> None:
    settings = planned(configure(train_length=96))
    made = save_to_cache(settings.weights_fingerprint)
    assert made == tmp_path / "cache" / "vllm_longmamba" / f"{settings.weights_fingerprint[:32]}.safetensors"
    config = configure(train_length=96, min_retention=0.25, unfiltered_end=7)
    assert CALIBRATION_KEY not in config.additional_config
    given = {"train_length": 96, "min_retention": 0.25, "unfiltered_end": 7}
    assert options_from_config(config.additional_config) == LongMambaOptions(table=str(made), **given)
    assert read_metadata(made).train_length == 96


@pytest.mark.parametrize(
    ("options", "end", "budget"),
    [
        ({}, 48, 0.5),
        ({"unfiltered_end": 24}, 24, 0.75),
        ({"unfiltered_end": 500}, 500, 0.25),
        ({"filter_generated": True}, 0, 1.0),
        ({"calibration_method": "paper"}, 0, 1.0),
        ({"calibration_method": "paper", "unfiltered_end": 24}, 24, 1.0),
    ],
)
def test_the_end_and_what_it_leaves_of_the_budget(
    options: dict[str, Any], end: int, budget: float, configure: Configure
) -> None:
    settings = planned(configure(train_length=96, **options))
    assert (settings.unfiltered_end, settings.budget) == (end, budget)
    metadata = settings.metadata()
    assert (metadata.unfiltered_end, metadata.budget) == (end, budget)


def test_a_found_table_with_an_end_is_not_for_generated_tokens(configure: Configure) -> None:
    """Unless the options say how long its end is to be; a table without an end is."""
    fingerprint = planned(configure(train_length=96)).weights_fingerprint
    made = save_to_cache(fingerprint, unfiltered_end=48)
    # Its training length is what the engine then calibrates with.
    config = configure(filter_generated=True)
    settings = planned(config)
    assert (settings.train_length, settings.unfiltered_end, settings.budget) == (96, 0, 1.0)
    assert config.additional_config["longmamba"]["table"] is None
    for options in ({}, {"filter_generated": True, "unfiltered_end": 0}):
        assert configure(**options).additional_config["longmamba"]["table"] == str(made)
    save_to_cache(fingerprint)
    assert configure(filter_generated=True).additional_config["longmamba"]["table"] == str(made)


def test_a_plan_is_dropped_where_a_table_has_come(configure: Configure) -> None:
    config = configure(train_length=96)
    made = save_to_cache(planned(config).weights_fingerprint)
    LongMambaModelConfig.verify_and_update_config(config)
    assert CALIBRATION_KEY not in config.additional_config
    assert config.additional_config["longmamba"]["table"] == str(made)


def test_a_quantized_engine_has_a_table_of_its_own(configure: Configure) -> None:
    """It reads neither the table of the weights as they are nor what an engine made of these."""
    plain = planned(configure(train_length=96))
    made = save_to_cache(plain.weights_fingerprint)
    config = configure(train_length=96)
    assert config.additional_config["longmamba"]["table"] == str(made)
    config.model_config.quantization = "fp8"
    config.additional_config = {"longmamba": {"train_length": 96}}
    LongMambaModelConfig.verify_and_update_config(config)
    quantized = planned(config)
    assert quantized == replace(plain, quantization="fp8", store=quantized.store)
    assert quantized.store != plain.store


def test_short_prompts_need_no_table(configure: Configure) -> None:
    """A warning names both lengths: whoever asks for the filter should know that it does nothing."""
    found: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = found.append  # type: ignore[method-assign]
    logging.getLogger("vllm.longmamba").addHandler(handler)
    try:
        config = configure(train_length=2000, max_model_len=2400)
    finally:
        logging.getLogger("vllm.longmamba").removeHandler(handler)
    assert CALIBRATION_KEY not in config.additional_config
    assert config.additional_config["longmamba"]["filter"] is False
    (warning,) = [record for record in found if record.levelno == logging.WARNING]
    assert "training length of 2000 tokens covers prompts of up to max_model_len 2400" in warning.getMessage()


def test_what_a_command_asks_for_is_completed(configure: Configure, tmp_path: Path) -> None:
    """Whatever tables there are, and more than one at a time."""
    text = tmp_path / "text.jsonl"
    text.write_text('{"body": "%s"}' % ("some text, " * 200))
    asked = CalibrationSettings(
        train_length=96, clamp_percent=7, seed=4, texts=(str(text),), text_column="body", store="/elsewhere"
    )
    config = configure(asked=[asked, replace(asked, seed=5)])
    first, second = from_config(config.additional_config)
    expected = planned(configure(train_length=96))
    filled = {name: getattr(expected, name) for name in ("model_id", "weights_fingerprint", "dtype", "quantization")}
    by_method = {"min_retention": 0.01, "budget": 1.0, "unfiltered_end": 0}
    assert first == replace(asked, corpus=first.corpus, **by_method, **filled)
    assert second == replace(first, seed=5)
    assert first.corpus.startswith("text.jsonl (blake3 ")


def test_a_command_makes_no_end_before_filtered_answers(configure: Configure) -> None:
    asked = [CalibrationSettings(train_length=96)]
    (settings,) = from_config(configure(asked=asked, filter_generated=True).additional_config)
    assert (settings.unfiltered_end, settings.budget) == (0, 1.0)


@pytest.mark.parametrize("given", [5, "x", [5], [{"unknown": 1}], [{"method": "open"}]])
def test_foreign_settings_are_refused(given: Any, configure: Configure) -> None:
    from vllm.engine.arg_utils import EngineArgs

    configure(train_length=96)
    model = next(Path(os.environ["XDG_CACHE_HOME"]).parent.glob("model"))
    arguments = EngineArgs(str(model), model_impl="longmamba", additional_config={CALIBRATION_KEY: given})
    with pytest.raises(
        ValueError, match=r"additional_config\['longmamba_calibration'\] is set by vllm_longmamba itself"
    ):
        arguments.create_engine_config()


def test_refusals(configure: Configure, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="and the engine makes none: the option calibrate is off"):
        configure(train_length=96, calibrate=False)
    with pytest.raises(ValueError, match="the training length of this 'mamba2' model is not known"):
        configure()
    with pytest.raises(ValueError, match=r"option calibration_text, or --text\) cannot be read: .*; name another"):
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
    settings = planned(configure(train_length=96))
    assert settings.store is not None
    monkeypatch.setattr(prepare, "calibration_obstacle", lambda config: "it is told not to")
    with pytest.raises(ValueError, match="and the engine makes none: it is told not to; make one with"):
        configure(train_length=96)
    Path(settings.store).parent.mkdir(parents=True)
    Path(settings.store).parent.chmod(0o755)
    save_table(settings.empty_table({0: 2}), settings.store)
    for config in (configure(train_length=96), configure(train_length=96, calibrate=False)):
        assert config.additional_config["longmamba"]["table"] == settings.store
        assert CALIBRATION_KEY not in config.additional_config
