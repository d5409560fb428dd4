"""Everything of vLLM that the plugin leans on, so that a new release of vLLM fails here, and says where.

The checks are those of vllm_longmamba/engine/drift.py, which an engine runs on a vLLM newer than the tested ones.
"""

import dataclasses
import importlib
import importlib.util
import inspect
import logging
import re
from pathlib import Path
from typing import Any

import pytest

from vllm_longmamba.architectures import DECIMATED, MODULES, supported
from vllm_longmamba.compatibility import IncompatibleVllmError
from vllm_longmamba.engine import drift
from vllm_longmamba.engine.drift import Check, all_checks, check_newer_vllm
from vllm_longmamba.engine.patches import PATCHES
from vllm_longmamba.engine.vllm_names import MIXER1, MIXER2

CHECKS = list(all_checks(PATCHES))

# Models that hold one of ours, and are not supported themselves.
EXCLUDED = {
    "NemotronH_Nano_VL_V2": "images and sound: vLLM's registry is asked for its language model when it is built",
    "NemotronH_Nano_Omni_Reasoning_V3": "as above",
    "NemotronH_Super_Omni_Reasoning_V3": "as above",
    "NemotronH_Omni_Reasoning_V3": "as above",
}


def resolve(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("check", CHECKS, ids=[check.target for check in CHECKS])
def test_check(check: Check) -> None:
    check.run()


@pytest.mark.parametrize(
    ("look", "target", "expected", "problem"),
    [
        (drift._exists, "vllm.config:Gone", [], "vllm.config:Gone is gone"),
        (drift._exists, "vllm.gone:Gone", [], "vllm.gone:Gone is gone"),
        (drift._begins_with, "vllm.v1.request:Request.__init__", [["self", "gone"]], "takes self, request_id, "),
        (drift._takes, "vllm.v1.request:Request.__init__", [["gone", "block_hasher"]], "takes no gone (used by x.py)"),
        (drift._has_fields, "vllm.config:CacheConfig", [["gone", "use_replayssm"]], "has no field gone (used by x.py)"),
        (drift._still_does, "vllm.v1.request:Request.__init__", ["gone", "the rule"], "counted on was: the rule"),
    ],
    ids=["name", "module", "parameters", "keyword", "field", "source"],
)
def test_what_a_check_finds(look: Any, target: str, expected: list[Any], problem: str) -> None:
    with pytest.raises(IncompatibleVllmError, match=re.escape(problem)):
        drift._check(look, target, "x.py", *expected).run()


@pytest.fixture
def newer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The installed vLLM says that it is a later one."""
    check_newer_vllm.cache_clear()
    monkeypatch.setattr(drift, "installed_vllm_version", lambda: "0.99.0")


@pytest.mark.usefixtures("newer")
def test_a_newer_vllm_that_passes(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    check_newer_vllm(PATCHES)
    check_newer_vllm(PATCHES)
    # A record comes twice where a test before has made vLLM's logger propagate as well.
    own = {id(record): record for record in caplog.records if record.name == "vllm.longmamba"}
    [record] = own.values()
    assert record.levelname == "WARNING"
    assert "LongMamba was tested with vLLM 0.32 and 0.33, but vLLM 0.99.0 is installed" in record.getMessage()


@pytest.mark.usefixtures("newer")
def test_a_newer_vllm_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift, "SYMBOLS", [("vllm:LLM", "a.py"), ("vllm:Gone", "b.py")])
    with pytest.raises(IncompatibleVllmError) as error:
        check_newer_vllm(PATCHES)
    message = str(error.value)
    assert "vLLM 0.99.0 is installed, in which vllm:Gone is gone" in message
    assert "(used by b.py). Install vLLM 0.33, or a newer vllm_longmamba; or leave --model-impl out." in message


def test_a_tested_vllm_is_not_checked(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    check_newer_vllm.cache_clear()
    monkeypatch.setattr(drift, "all_checks", lambda _: pytest.fail("checked"))
    check_newer_vllm(PATCHES)
    assert not caplog.records


def test_mixers_can_be_replaced() -> None:
    from vllm.model_executor.custom_op import PluggableLayer

    for target in (MIXER1, MIXER2):
        assert issubclass(resolve(target), PluggableLayer), f"{target} is no PluggableLayer any more (models.py)"


def test_input_batch_can_be_copied() -> None:
    batch = resolve("vllm.v1.worker.gpu.input_batch:InputBatch")
    init = {field.name for field in dataclasses.fields(batch) if not field.init}
    assert not init, f"model_state.py copies InputBatch by dataclasses.replace, which cannot set {init}"


def models_on_mixers() -> dict[str, str]:
    """Architectures of vLLM's registry whose module builds one of the mixers, or imports a model that does."""
    from vllm.model_executor.models import registry

    classes = "|".join({class_name for _, class_name in supported().values()})
    builds = re.compile(rf"\bMambaMixer2?\(|^from \S+ import .*\b({classes})\b", re.MULTILINE)
    found = {}
    for architecture, (module, _) in registry._VLLM_MODELS.items():
        full = module if "." in module else f"vllm.model_executor.models.{module}"
        spec = importlib.util.find_spec(full)
        assert spec is not None
        assert spec.origin is not None
        origin = Path(spec.origin)
        files = sorted(origin.parent.rglob("*.py")) if origin.name == "__init__.py" else [origin]
        if any(builds.search(path.read_text()) for path in files):
            found[architecture] = module
    return found


def test_every_model_on_the_mixers_is_supported() -> None:
    found = models_on_mixers()
    assert set(EXCLUDED) <= set(found), "an architecture that is left out no longer exists: take it off EXCLUDED"
    assert {name for name in found if name not in EXCLUDED} == set(supported()), (
        "architectures.py: MODULES is not the set of vLLM's modules that build models of its Mamba mixers"
    )
    assert set(MODULES) == {found[name] for name in supported()}


@pytest.mark.parametrize("architecture", supported())
def test_variant_of_every_supported_model(architecture: str) -> None:
    from vllm_longmamba.engine import decimamba_models, models

    module, class_name = supported()[architecture]
    stock = resolve(f"vllm.model_executor.models.{module}:{class_name}")
    variant = getattr(models, f"Long{architecture}")
    assert issubclass(variant, models.LongMambaModel)
    assert issubclass(variant, stock)
    if architecture in DECIMATED:
        assert issubclass(getattr(decimamba_models, f"Deci{architecture}"), decimamba_models.DeciMambaModel)
        assert issubclass(getattr(decimamba_models, f"Deci{architecture}"), stock)
    assert {"vllm_config", "prefix"} <= set(inspect.signature(stock.__init__).parameters)
    assert "weights" in inspect.signature(stock.load_weights).parameters
