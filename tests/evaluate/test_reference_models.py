"""The torch reference is found in a source checkout only."""

import sys
from pathlib import Path

import pytest

from vllm_longmamba.evaluate import reference_models
from vllm_longmamba.evaluate.methods import METHODS, ModelSettings


def test_it_is_that_of_this_checkout() -> None:
    home = Path(str(reference_models.reference_module().__file__))
    assert home.is_relative_to(Path(__file__).parents[1] / "references" / "torch_models")


@pytest.mark.parametrize("method", ["decimamba", "torch-plain", "torch-longmamba"])
def test_elsewhere_it_is_refused(method: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(reference_models, "_FOLDER", tmp_path / "tests" / "references")
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if Path(folder).name != "references"])
    for module in [name for name in sys.modules if name.partition(".")[0] == "torch_models"]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(ValueError, match="DeciMamba runs in a source checkout only"):
        METHODS[method](ModelSettings({"model": "m"}, {"model": "m"}))
