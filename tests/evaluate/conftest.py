"""Puts the torch reference models on the path, where the package is installed without its source checkout, too."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "references"))
