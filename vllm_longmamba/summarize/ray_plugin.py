"""The plugin as a Ray runtime environment, so that workers need not have it installed."""

import shutil
import tempfile
from importlib import metadata
from pathlib import Path

from vllm_longmamba import __version__

_DISTRIBUTION = "vllm-longmamba"
_PACKAGES = ("kernels", "tables")


def plugin_modules(folder: Path) -> list[str]:
    """Copy the plugin into a folder, in a form that Ray sends to its workers.

    Two folders: the package, and its metadata, through which vLLM finds the plugin.

    Args:
        folder: where to put them; must stay until the job ends.

    Returns:
        Entries for `py_modules` of a runtime environment.
    """
    import vllm_longmamba
    from vllm_longmamba import kernels, tables

    package = folder / "vllm_longmamba"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(vllm_longmamba.__file__).parent, package, ignore=ignored)
    # In a source checkout these two stand elsewhere.
    for part in (kernels, tables):
        name = part.__name__.rpartition(".")[2]
        shutil.copytree(Path(str(part.__file__)).parent, package / name, dirs_exist_ok=True, ignore=ignored)
    information = folder / f"vllm_longmamba-{__version__}.dist-info"
    information.mkdir()
    installed = metadata.distribution(_DISTRIBUTION)
    for name in ("METADATA", "entry_points.txt"):
        (information / name).write_text(installed.read_text(name) or "", encoding="utf-8")
    return [str(package), str(information)]


def staging_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder for `plugin_modules` that goes with the job."""
    return tempfile.TemporaryDirectory(prefix="longmamba-ray-")
