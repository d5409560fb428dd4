"""The tree, a wheel and an editable install hold the same modules, and the folders keep apart what they must."""

import ast
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Modules that vLLM imports before it shows any error of theirs, and what those import at module level.
LIGHT_MODULES = ("plugin", "compatibility", "architectures")
# The folders and root modules of the package, from the top: each may import those in the lines below its own.
LAYERS = (
    ("cli",),
    ("commands",),
    ("evaluate", "inspect", "summarize"),
    ("plugin",),
    ("engine",),
    ("calibration",),
    ("layers", "checkpoint"),
    ("decimamba_options",),
    ("options", "architectures"),
    ("compatibility", "kernels", "tables", "chat_templates"),
)

# Run by a fresh interpreter; argv: folder to put first on the path, or "" for none.
LIST_MODULES = """
import json, pkgutil, sys
if sys.argv[1]:
    sys.path.insert(0, sys.argv[1])
import vllm_longmamba, vllm_longmamba.kernels, vllm_longmamba.tables, vllm_longmamba.tables.shipped
packages = [vllm_longmamba.kernels, vllm_longmamba.tables, vllm_longmamba.tables.shipped]
print(json.dumps({
    "home": vllm_longmamba.__file__,
    "names": {p.__name__: sorted(getattr(p, "__all__", [])) for p in packages},
    "modules": {p.__name__: sorted(m.name for m in pkgutil.iter_modules(p.__path__)) for p in packages},
    "files": {p.__name__: p.__file__ for p in packages},
}))
"""


def imported_modules(tree: ast.AST) -> Iterator[str]:
    """Full names of the modules that a file imports; relative ones with a dot for each level."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


def module_level_imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    return set(imported_modules(ast.Module(body=list(top), type_ignores=[])))


@pytest.fixture(scope="session")
def bare_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a source checkout holds, so that building leaves nothing in the real one."""
    tree = tmp_path_factory.mktemp("tree") / "checkout"
    tree.mkdir()
    for name in ("vllm_longmamba", "kernels", "tables"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, tree / name)
    return tree


@pytest.fixture(scope="session")
def wheel(bare_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from the tree."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(bare_tree, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    command += ["--disable-pip-version-check", "--wheel-dir", str(folder), str(source)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    (built,) = folder.glob("*.whl")
    return built


def list_modules(cwd: Path, first_on_path: Path | None) -> Any:
    command = [sys.executable, "-I", "-c", LIST_MODULES, str(first_on_path or "")]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


def own_modules() -> dict[str, Path]:
    """Name of every module of the package, as it is imported, and its file."""
    modules = {}
    for top in ("vllm_longmamba", "kernels", "tables"):
        for path in (ROOT / top).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts if parts[-1] != "__init__" else parts[:-1])
            modules[name if top == "vllm_longmamba" else f"vllm_longmamba.{name}"] = path
    return modules


def own_imports() -> dict[str, set[str]]:
    """Module -> the modules of the package that it imports anywhere, within functions too."""
    modules = own_modules()
    graph: dict[str, set[str]] = {name: set() for name in modules}
    for name, path in modules.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for node in ast.walk(ast.parse(path.read_text())):
            for imported in _absolute_names(node, package):
                found = imported if imported in modules else imported.rpartition(".")[0]
                if found in modules and found != name:
                    graph[name].add(found)
    return graph


def _absolute_names(node: ast.AST, package: str) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            parent = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*parent, *filter(None, [node.module])])
        yield from (f"{base}.{alias.name}" for alias in node.names)


def test_imports_go_downwards_only() -> None:
    place = {folder: number for number, folders in enumerate(LAYERS) for folder in folders}
    graph = own_imports()
    assert len(graph) > 100
    assert {name.split(".")[1] for name in graph if "." in name} == set(place), "every folder has a place in LAYERS"
    upwards = [
        f"{name} imports {imported}"
        for name, imports in graph.items()
        for imported in imports
        if "." in name and "." in imported and name.split(".")[1] != imported.split(".")[1]
        if place[name.split(".")[1]] >= place[imported.split(".")[1]]
    ]
    assert upwards == []


def test_no_import_circles() -> None:
    waiting = own_imports()
    while leaves := [name for name, imports in waiting.items() if not imports & waiting.keys()]:
        for name in leaves:
            del waiting[name]
    assert waiting == {}, "these modules import each other, or a module that does"


@pytest.mark.parametrize("folder", ["kernels", "tables"])
def test_kernels_and_tables_know_neither_vllm_nor_each_other(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert len(files) > 3
    wrong = []
    for path in files:
        depth = len(path.relative_to(ROOT / folder).parts)
        for name in imported_modules(ast.parse(path.read_text())):
            level = len(name) - len(name.lstrip("."))
            if name.partition(".")[0] in ("vllm", "vllm_longmamba", "kernels", "tables") or level > depth:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert wrong == []


@pytest.mark.parametrize("module", LIGHT_MODULES)
def test_light_modules_import_only_the_standard_library(module: str) -> None:
    own = {f"vllm_longmamba.{name}" for name in LIGHT_MODULES}
    imports = module_level_imports(ROOT / "vllm_longmamba" / f"{module}.py")
    heavy = {name for name in imports - own if name.partition(".")[0] not in sys.stdlib_module_names}
    assert heavy == set(), f"vLLM swallows errors of these imports, so {module}.py must make them inside its functions"


def test_modules_import_while_vllm_builds_a_model() -> None:
    """They may be imported for the first time then: torch's defaults are the model's dtype and its device."""
    code = (
        "import importlib, pkgutil, torch, vllm, vllm_longmamba; torch.set_default_dtype(torch.bfloat16); "
        "torch.set_default_device('meta'); names = ['engine.models', 'kernels', 'tables', 'calibration.at_start', "
        "'calibration.worker', 'engine.model_state', 'engine.decimamba_models', "
        "'engine.prefix_cache', 'inspect']; "
        "[importlib.import_module(f'vllm_longmamba.{name}') for name in names]"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_importing_the_plugin_imports_neither_vllm_nor_torch() -> None:
    code = (
        "import sys, vllm_longmamba.plugin; heavy = {'vllm', 'torch', 'numpy'} & set(sys.modules); "
        "assert not heavy, heavy; print(vllm_longmamba.plugin.register.__name__)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "register"


def test_bare_tree_wheel_and_installation_hold_the_same_modules(bare_tree: Path, wheel: Path, tmp_path: Path) -> None:
    unpacked = tmp_path / "unpacked"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    from_tree = list_modules(bare_tree, bare_tree)
    from_wheel = list_modules(elsewhere, unpacked)
    installed = list_modules(elsewhere, None)

    assert Path(from_tree["home"]).is_relative_to(bare_tree)
    assert Path(from_tree["files"]["vllm_longmamba.kernels"]) == bare_tree / "kernels" / "__init__.py"
    assert Path(from_wheel["home"]).is_relative_to(unpacked)
    assert Path(from_wheel["files"]["vllm_longmamba.tables"]).is_relative_to(unpacked / "vllm_longmamba")
    for other in (from_wheel, installed):
        assert other["names"] == from_tree["names"]
        assert other["modules"] == from_tree["modules"]
    assert "selective_scan" in from_tree["modules"]["vllm_longmamba.kernels"]
    assert "load_table" in from_tree["names"]["vllm_longmamba.tables"]


def test_wheel_contents(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    top_level = {name.partition("/")[0] for name in names}
    assert {name for name in top_level if not name.endswith(".dist-info")} == {"vllm_longmamba"}
    assert {"vllm_longmamba/py.typed", "vllm_longmamba/commands/features.toml"} <= names
    sources = {
        f"vllm_longmamba/{path.relative_to(ROOT / folder if folder == 'vllm_longmamba' else ROOT)}"
        for folder in ("vllm_longmamba", "kernels", "tables")
        for path in (ROOT / folder).rglob("*.py")
    }
    assert {name for name in names if name.endswith(".py")} == sources
    tables = {f"vllm_longmamba/tables/shipped/{path.name}" for path in (ROOT / "tables/shipped").glob("*.safetensors")}
    assert {name for name in names if name.endswith(".safetensors")} == tables
    entry_points = next(name for name in names if name.endswith("entry_points.txt"))
    with zipfile.ZipFile(wheel) as archive:
        assert "longmamba = vllm_longmamba.plugin:register" in archive.read(entry_points).decode()


def test_command_runs_from_any_folder(tmp_path: Path) -> None:
    code = "import vllm_longmamba.cli as cli; cli.app(['--version'])"
    result = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("vllm-longmamba ")
