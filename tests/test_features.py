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


COLLECT = """
import sys
import pytest

class Names:
    def pytest_collection_finish(self, session):
        for item in session.items:
            print(item.nodeid, "needs a GPU" if item.get_closest_marker("gpu") else "", sep="\\t")

sys.exit(pytest.main(["--collect-only", "-qq", "-p", "no:cacheprovider", *sys.argv[1:]], plugins=[Names()]))
"""


@pytest.fixture(scope="module")
def collected() -> dict[str, bool]:
    """Name -> whether it needs a GPU, of the tests in the files that features.toml names."""
    files = {f"tests/{test.partition('::')[0]}" for test in named_tests()}
    command = [sys.executable, "-c", COLLECT, *sorted(files)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:]
    lines = [line.partition("\t") for line in result.stdout.splitlines() if "\t" in line]
    return {name.removeprefix("tests/"): bool(gpu) for name, _, gpu in lines}


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


def test_every_named_test_exists(collected: dict[str, bool]) -> None:
    assert set(named_tests()) - set(collected) == set()
    assert len(named_tests()) > 50


def test_what_works_on_a_cpu_does_not_need_a_gpu(collected: dict[str, bool]) -> None:
    assert any(collected.values())
    for feature in FEATURES:
        for entry in feature.entries.values():
            if entry.state in ("works", "refused"):
                assert entry.test is not None
                assert not collected[entry.test], f"{feature.name}: {entry.test}"


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
        KVTransferConfig,
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
        "kv_transfer_config": KVTransferConfig,
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
        elif owner == "platform":
            from vllm.platforms import current_platform

            assert isinstance(getattr(current_platform, name), str)
        elif name:
            fields = owners[owner].__dataclass_fields__ | {"runner_type": None}
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


def test_a_platform_is_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.platforms import current_platform

    on = {}
    for name in ("cpu", "cuda", "rocm", "xpu"):
        monkeypatch.setattr(current_platform, "device_name", name, raising=False)
        on[name] = [
            feature.name for feature in FEATURES if feature.name in ("CPU", "ROCm, XPU") and feature.is_on(None)
        ]
    assert on == {"cpu": ["CPU"], "cuda": [], "rocm": ["ROCm, XPU"], "xpu": ["ROCm, XPU"]}


def test_offloading_is_no_transfer_between_engines() -> None:
    (feature,) = [feature for feature in FEATURES if feature.name.startswith("KV transfer between engines")]
    for connector, is_on in (("OffloadingConnector", False), ("NixlConnector", True)):
        assert feature.is_on(SimpleNamespace(kv_transfer_config=SimpleNamespace(kv_connector=connector))) == is_on
    assert not feature.is_on(SimpleNamespace(kv_transfer_config=None))
