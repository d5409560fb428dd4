"""docs/features.md says what features.toml says, and every test that it names exists."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from documents import ROOT

from vllm_longmamba.architectures import supported
from vllm_longmamba.commands.features import FAMILIES, Entry, family_of, read_features

sys.path.insert(0, str(ROOT / "benchmarks"))
from features_page import fill

FEATURES = read_features()


@pytest.fixture(scope="module")
def collected() -> set[str]:
    """The names of the tests in the files that features.toml names."""
    files = {f"tests/{test.partition('::')[0]}" for test in named_tests()}
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *sorted(files)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:]
    return set(result.stdout.splitlines())


def named_tests() -> list[str]:
    return [entry.test for feature in FEATURES for entry in feature.entries.values() if entry.test is not None]


def test_page_and_file_say_the_same() -> None:
    page = (ROOT / "docs" / "features.md").read_text()
    assert page == fill(page, FEATURES), "run python benchmarks/features_page.py"
    assert page.count("\n| ") > len(FEATURES)


def test_the_page_is_compared() -> None:
    feature = FEATURES[0]
    changed = [SimpleNamespace(**(vars(feature) | {"entries": feature.entries | {"zamba2": Entry("untested")}}))]
    page = (ROOT / "docs" / "features.md").read_text()
    assert fill(page, [*changed, *FEATURES[1:]]) != page


def test_every_named_test_exists(collected: set[str]) -> None:
    missing = {test for test in named_tests() if f"tests/{test}" not in collected}
    assert missing == set()
    assert len(named_tests()) > 50


def test_tests_of_a_gpu_are_marked() -> None:
    """A test that only a GPU runs must not stand as one that runs on a CPU."""
    for feature in FEATURES:
        for entry in feature.entries.values():
            if entry.state == "works":
                assert entry.test is not None
                text = (ROOT / "tests" / entry.test.partition("::")[0]).read_text()
                assert "pytestmark = [pytest.mark.gpu" not in text, f"{feature.name}: {entry.test}"


def test_names_are_given_once() -> None:
    names = [feature.name for feature in FEATURES]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    "entry",
    [
        '"perhaps"',
        '{ works = "a", date = 2026-11-22 }',
        '{ gpu = "a" }',
        '{ gpu = "a", date = "yesterday" }',
        '{ works = "a", refused = "b" }',
        "{ date = 2026-11-22 }",
    ],
)
def test_a_wrong_entry(entry: str, tmp_path: Path) -> None:
    path = tmp_path / "features.toml"
    path.write_text(f'[[feature]]\nname = "it"\nall = "untested"\nmamba2 = {entry}\n')
    with pytest.raises(ValueError, match=r"features.toml: it, mamba2: an entry must be of one of the forms"):
        read_features(path)


@pytest.mark.parametrize("architecture", supported())
def test_family_of(architecture: str) -> None:
    expected = {
        "MambaForCausalLM": "mamba1",
        "FalconMambaForCausalLM": "mamba1",
        "Mamba2ForCausalLM": "mamba2",
        "Zamba2ForCausalLM": "zamba2",
    }
    assert family_of(architecture) == expected.get(architecture, "hybrids")
    assert set(expected.values()) | {"hybrids"} == set(FAMILIES)


@pytest.fixture(scope="module")
def default_config() -> Any:
    """An engine's configuration with every setting at its default."""
    from vllm.config import VllmConfig

    return VllmConfig()


def test_settings_exist(default_config: Any) -> None:
    """vLLM still has what `longmamba doctor` looks at."""
    from vllm.config import (
        CacheConfig,
        CompilationConfig,
        DeviceConfig,
        LoadConfig,
        ModelConfig,
        ParallelConfig,
        SchedulerConfig,
        SpeculativeConfig,
    )
    from vllm.config.mamba import MambaConfig

    owners: dict[str, Any] = {
        "cache_config": CacheConfig,
        "compilation_config": CompilationConfig,
        "device_config": DeviceConfig,
        "load_config": LoadConfig,
        "mamba_config": MambaConfig,
        "model_config": ModelConfig,
        "parallel_config": ParallelConfig,
        "scheduler_config": SchedulerConfig,
        "speculative_config": SpeculativeConfig,
    }
    for feature in FEATURES:
        owner, _, name = (feature.setting or "").partition(".")
        if owner == "env":
            import vllm.envs

            assert name in vllm.envs.environment_variables
        elif name:
            fields = owners[owner].__dataclass_fields__ | {"runner_type": None, "device_type": None}
            assert name in fields, feature.setting
        elif owner:
            assert hasattr(default_config, owner), feature.setting


IS_ON: list[tuple[str, Callable[[Any], Any]]] = [
    ("tensor parallelism", lambda config: setattr(config.parallel_config, "tensor_parallel_size", 2)),
    ("prefix cache", lambda config: setattr(config.cache_config, "enable_prefix_caching", True)),
    ("quantization: fp8", lambda config: setattr(config.model_config, "quantization", "fp8")),
    ("LoRA", lambda config: setattr(config, "lora_config", object())),
]


@pytest.mark.parametrize(("name", "switch_on"), IS_ON, ids=[name for name, _ in IS_ON])
def test_is_on(name: str, switch_on: Callable[[Any], Any]) -> None:
    (feature,) = [feature for feature in FEATURES if feature.name == name]
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
        cache_config=SimpleNamespace(enable_prefix_caching=False),
        model_config=SimpleNamespace(quantization=None),
        lora_config=None,
    )
    assert not feature.is_on(config)
    switch_on(config)
    assert feature.is_on(config)


def test_a_variable_is_on(monkeypatch: pytest.MonkeyPatch) -> None:
    (feature,) = [feature for feature in FEATURES if feature.setting == "env.VLLM_BATCH_INVARIANT"]
    monkeypatch.delenv("VLLM_BATCH_INVARIANT", raising=False)
    assert not feature.is_on(None)
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    assert feature.is_on(None)
