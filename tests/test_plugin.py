"""Tests of vllm_longmamba/plugin.py and of the patches it applies."""

import sys
import types
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tiny_models import write_hf_twin, write_mamba1_original, write_mamba2_original, write_zamba2

from vllm_longmamba import compatibility
from vllm_longmamba.compatibility import IncompatibleVllmError
from vllm_longmamba.engine.patch import MARK, Patch
from vllm_longmamba.engine.patches import PATCHES, apply_patches
from vllm_longmamba.plugin import register

IDS = [patch.name for patch in PATCHES]
STOCK = SimpleNamespace(model_impl="auto")


def patched_function(patch: Patch) -> Any:
    return getattr(patch.holder(), patch.name)


def test_register_twice_is_harmless() -> None:
    from vllm.model_executor.models import ModelRegistry
    from vllm.transformers_utils.config import get_config_parser

    register()
    before = [patched_function(patch) for patch in PATCHES if not patch.in_worker]
    models, parser = dict(ModelRegistry.models), type(get_config_parser("hf"))
    register()
    assert [patched_function(patch) for patch in PATCHES if not patch.in_worker] == before
    assert ModelRegistry.models == models
    assert type(get_config_parser("hf")) is parser
    assert "LongMamba2ForCausalLM" in models


def test_register_refuses_an_old_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compatibility, "installed_vllm_version", lambda: "0.31.0")
    with pytest.raises(IncompatibleVllmError, match=r"vLLM 0\.31\.0 is installed"):
        register()


@pytest.mark.parametrize("patch", PATCHES, ids=IDS)
def test_apply_patches_once_and_marked(patch: Patch) -> None:
    apply_patches(in_worker=patch.in_worker)
    wrapper = patched_function(patch)
    assert getattr(wrapper, MARK) is True
    # One wrapper only: what it wraps is vLLM's.
    assert not hasattr(wrapper.__wrapped__, MARK)
    assert wrapper.__wrapped__.__module__ == patch.module
    apply_patches(in_worker=patch.in_worker)
    assert patched_function(patch) is wrapper


@pytest.mark.parametrize("patch", PATCHES, ids=IDS)
def test_every_patch_says_why(patch: Patch) -> None:
    assert len(patch.reason) > 5
    assert patch.parameters


def fake_module(monkeypatch: pytest.MonkeyPatch, **content: Any) -> None:
    module = types.ModuleType("fake_vllm")
    vars(module).update(content)
    monkeypatch.setitem(sys.modules, "fake_vllm", module)


class Owner:
    """Stands for a class of vLLM."""

    def method(self, request: Any, later: int = 0) -> tuple[Any, int]:
        return request, later


def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return "wrapped", original(*args, **kwargs)

    return wrapper


def patch_of(owner: str | None = "Owner", name: str = "method", *parameters: str) -> Patch:
    return Patch("fake_vllm", owner, name, parameters or ("self", "request"), wrap, "a test")


def test_patch_apply(monkeypatch: pytest.MonkeyPatch) -> None:
    owner = type("Owner", (Owner,), {"method": lambda self, request, later=0: (request, later)})
    fake_module(monkeypatch, Owner=owner)
    for _ in range(2):
        patch_of().apply()
        assert owner().method("r", later=3) == ("wrapped", ("r", 3))


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        (patch_of(None, "gone"), r"cannot extend fake_vllm\.gone of this vLLM: it does not exist"),
        (patch_of("Gone"), r"cannot extend fake_vllm\.Gone\.method of this vLLM: it cannot be imported"),
        (patch_of("Owner", "gone"), r"cannot extend fake_vllm\.Owner\.gone of this vLLM: it does not exist"),
        (
            patch_of("Owner", "method", "self", "prompt"),
            r"fake_vllm\.Owner\.method of this vLLM: its parameters are self, request, later, not self, prompt",
        ),
        (patch_of("Owner", "method", "request"), r"its parameters are self, request, later, not request"),
        (
            Patch("fake_vllm.gone", None, "function", ("x",), wrap, "a test"),
            r"cannot extend fake_vllm\.gone\.function of this vLLM: it cannot be imported",
        ),
    ],
    ids=["function", "class", "method", "renamed-parameter", "order", "module"],
)
def test_patch_names_what_has_changed(patch: Patch, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_module(monkeypatch, Owner=Owner)
    before = dict(vars(Owner))
    with pytest.raises(IncompatibleVllmError, match=message) as error:
        patch.apply()
    assert "Install a vLLM version that this release of vllm_longmamba was tested with" in str(error.value)
    assert dict(vars(Owner)) == before


# What each patched function gets for a model without --model-impl longmamba.
RUNNER = SimpleNamespace(model_config=SimpleNamespace(model_impl="auto", model_arch_config=None))
CORE = SimpleNamespace(vllm_config=SimpleNamespace(model_config=STOCK))
PLAIN = SimpleNamespace(model_impl="auto", hf_config=SimpleNamespace())
REQUEST = SimpleNamespace(cache_salt="mine", num_prompt_tokens=4, num_computed_tokens=0)
SCHEDULER = SimpleNamespace(cache_config=SimpleNamespace(block_size=2), use_eagle_block_drop=False)
STOCK_CALLS: dict[str, tuple[Any, ...]] = {
    "_set_default_chunked_prefill_and_prefix_caching_args": (SimpleNamespace(enable_chunked_prefill=None), PLAIN),
    "_rebind_kernels": ([],),
    "inspect_model_cls": (None, ["LlamaForCausalLM"], PLAIN),
    "resolve_model_cls": (None, ["LlamaForCausalLM"], PLAIN),
    "_build_attention_metadata": (RUNNER, 3, 2),
    "_initialize_kv_caches": (CORE, CORE.vllm_config),
    "preprocess_add_request": (CORE, REQUEST),
    "reload_weights": (CORE,),
    "generate_block_hash_extra_keys": (REQUEST, 0, 16, 0),
    "_mamba_block_aligned_split": (SCHEDULER, REQUEST, 16, 0, 0),
}


@pytest.mark.parametrize("patch", PATCHES, ids=IDS)
def test_patches_pass_stock_models_through(patch: Patch) -> None:
    calls: list[tuple[Any, ...]] = []
    result = (None, 7)

    def original(*args: Any) -> Any:
        calls.append(args)
        return result

    arguments = STOCK_CALLS[patch.name]
    assert patch.wrap(original)(*arguments) == result
    assert calls == [arguments]
    assert REQUEST.cache_salt == "mine"


def patch_named(name: str) -> Patch:
    return next(patch for patch in PATCHES if patch.name == name)


@pytest.mark.parametrize(
    ("model_impl", "given", "cut_prompts", "expected"),
    [
        ("decimamba", None, False, False),
        ("decimamba", True, False, True),
        ("decimamba", None, True, True),
        ("decimamba", False, True, False),
        ("longmamba", None, False, True),
        ("auto", None, False, True),
    ],
)
def test_only_decimamba_takes_whole_prompts_by_default(
    model_impl: str, given: bool | None, cut_prompts: bool, expected: bool
) -> None:
    def original(self: Any, model_config: Any) -> None:
        if self.enable_chunked_prefill is None:
            self.enable_chunked_prefill = True

    additional_config = {"decimamba": {"cut_prompts": cut_prompts}}
    arguments = SimpleNamespace(enable_chunked_prefill=given, additional_config=additional_config)
    wrapped = patch_named("_set_default_chunked_prefill_and_prefix_caching_args").wrap(original)
    wrapped(arguments, SimpleNamespace(model_impl=model_impl))
    assert arguments.enable_chunked_prefill is expected


def test_prompt_lengths_are_exposed_for_one_call_only() -> None:
    arch_config = SimpleNamespace(rswa_window=None)
    runner = SimpleNamespace(
        model_config=SimpleNamespace(model_impl="longmamba", model_arch_config=arch_config, max_model_len=4096),
        vllm_config=SimpleNamespace(kv_transfer_config=None),
        input_batch=SimpleNamespace(num_prompt_tokens=np.array([7, 8], np.int32)),
    )
    seen = []

    def original(self: Any, num_tokens: int, num_reqs: int) -> str:
        seen.append((num_tokens, num_reqs, arch_config.rswa_window))
        if num_tokens == 0:
            raise RuntimeError("from vLLM")
        return "metadata"

    build = patch_named("_build_attention_metadata").wrap(original)
    assert build(runner, 3, num_reqs=2) == "metadata"
    assert arch_config.rswa_window is None
    with pytest.raises(RuntimeError, match="from vLLM"):
        build(runner, 0, 0)
    assert arch_config.rswa_window is None
    assert seen == [(3, 2, 4096), (0, 0, 4096)]


def test_generated_blocks_get_a_key_behind_those_of_vllm() -> None:
    request = SimpleNamespace(cache_salt="longmamba:0a:3:0|", num_prompt_tokens=20)
    own = ("longmamba_prompt_length", 20)
    for keys in (None, ("lora",)):
        wrapped = patch_named("generate_block_hash_extra_keys").wrap(lambda *_, keys=keys: (keys, 1))
        assert wrapped(request, 0, 16, 0) == (keys, 1)
        assert wrapped(request, 16, 32, 0) == ((*(keys or ()), own), 1)


def test_llvmlite_is_hidden_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = {"llvmlite": types.ModuleType("llvmlite"), "llvmlite.ir": types.ModuleType("llvmlite.ir")}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)

    def original(overrides: Any) -> Any:
        assert not any(name.partition(".")[0] == "llvmlite" for name in sys.modules)
        if overrides == "fail":
            raise RuntimeError("from vLLM")
        return overrides

    rebind = patch_named("_rebind_kernels").wrap(original)
    assert rebind("kernels") == "kernels"
    with pytest.raises(RuntimeError, match="from vLLM"):
        rebind("fail")
    assert {name: sys.modules[name] for name in modules} == modules


WRITERS: dict[str, Callable[[Path], Path]] = {
    "mamba1-original": lambda path: write_mamba1_original(path, n_layer=1, d_model=32),
    "mamba2-original": lambda path: write_mamba2_original(path, n_layer=1, d_model=32),
    "mamba1-twin": lambda path: write_hf_twin(write_mamba1_original(path / "o", n_layer=1, d_model=32), path),
    "mamba2-twin": lambda path: write_hf_twin(write_mamba2_original(path / "o", n_layer=1, d_model=32), path),
    "zamba2": write_zamba2,
}


def resolved(folder: Path, model_impl: str) -> tuple[str, type, Any]:
    """Architecture and class that vLLM chooses, and its `ModelConfig`; no engine is started."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.models import ModelRegistry

    model_config = EngineArgs(model=str(folder), model_impl=model_impl, dtype="float32").create_model_config()
    model_class, architecture = ModelRegistry.resolve_model_cls(model_config.architectures, model_config)
    assert architecture == model_config.architecture
    return architecture, model_class, model_config


@pytest.mark.parametrize(
    ("family", "architecture", "max_model_len"),
    [
        ("mamba1-twin", "MambaForCausalLM", 2048),
        ("mamba2-twin", "Mamba2ForCausalLM", 2048),
        ("zamba2", "Zamba2ForCausalLM", 8192),
    ],
    ids=["mamba1", "mamba2", "zamba2"],
)
@pytest.mark.parametrize("model_impl", ["auto", "vllm"])
def test_without_the_flag_vllm_is_stock(
    family: str, architecture: str, max_model_len: int, model_impl: str, tmp_path: Path
) -> None:
    name, model_class, model_config = resolved(WRITERS[family](tmp_path), model_impl)
    assert name == architecture
    assert model_class.__name__ == architecture
    assert model_class.__module__.startswith("vllm.model_executor.models.")
    assert model_config.max_model_len == max_model_len
    assert model_config.tokenizer == model_config.model


@pytest.mark.parametrize(
    ("family", "architecture"),
    [
        ("mamba1-original", "MambaForCausalLM"),
        ("mamba1-twin", "MambaForCausalLM"),
        ("mamba2-original", "Mamba2ForCausalLM"),
        ("mamba2-twin", "Mamba2ForCausalLM"),
        ("zamba2", "Zamba2ForCausalLM"),
    ],
)
def test_with_the_flag_vllm_takes_the_variant(family: str, architecture: str, tmp_path: Path) -> None:
    name, model_class, _ = resolved(WRITERS[family](tmp_path), "longmamba")
    assert name == f"Long{architecture}"
    assert model_class.__name__ == name
    assert model_class.__module__ == "vllm_longmamba.engine.models"
    stock = model_class.__mro__[2]
    assert (stock.__name__, stock.__module__.rpartition(".")[0]) == (architecture, "vllm.model_executor.models")
