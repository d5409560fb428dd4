"""LongMamba for vLLM: Mamba models on prompts far longer than they were trained on (arXiv 2504.16053)."""

from pathlib import Path

__version__ = "0.1.0"

_source_tree = Path(__file__).resolve().parent.parent
if (_source_tree / "kernels" / "__init__.py").is_file() and (_source_tree / "pyproject.toml").is_file():
    # In a source checkout kernels/ and tables/ stand beside this folder; in a wheel they lie below it.
    __path__.append(str(_source_tree))
