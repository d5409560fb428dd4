"""The torch reference models, which lie in tests/references and are no part of an installed package."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

_FOLDER = Path(__file__).resolve().parents[2] / "tests" / "references"


def reference_module(name: str = "torch_models") -> ModuleType:
    """Import torch_models, or a module of it, from the source checkout.

    Raises:
        ValueError: this is no source checkout.
    """
    if (_FOLDER / "torch_models").is_dir() and str(_FOLDER) not in sys.path:
        sys.path.append(str(_FOLDER))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(
            "DeciMamba runs in a source checkout only, as do --method torch-plain and torch-longmamba: their models "
            "are in its tests/references; install with `pip install -e .` from a clone of the repository"
        ) from error
