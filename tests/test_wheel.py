"""The release: sdist and wheel are complete, and the wheel serves the example model from outside of the checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest

from vllm_longmamba import __version__

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples" / "passkey-mamba2-4m"
pytestmark = pytest.mark.slow
# Settings of tests, which a user does not have: without them the engine runs in a process of its own.
OF_TESTS = ("PYTHONPATH", "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_WORKER_MULTIPROC_METHOD", "VLLM_LOGGING_LEVEL")

# Asks for a key at four times the training length, with the table that is in the wheel.
ASK = """
import sys

import vllm_longmamba
from vllm import LLM, SamplingParams


def main():
    text = open(sys.argv[2]).read()
    key, question = "\\nThe pass key is 48213. Remember it.\\n", "\\nWhat is the pass key? The pass key is "
    prompt = text[:600] + key + text[600:2000] + question
    llm = LLM(
        sys.argv[1], model_impl="longmamba", dtype="float32", max_num_seqs=4, max_model_len=4096, enforce_eager=True,
        additional_config={"longmamba": {"calibrate": False}},
    )
    [answer] = llm.generate([prompt], SamplingParams(max_tokens=5, temperature=0.0))
    print("from", vllm_longmamba.__file__)
    print("answer", answer.outputs[0].text)


# The engine's process imports this file.
if __name__ == "__main__":
    main()
"""


def _run(*command: object, **changes: object) -> str:
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, **changes)  # type: ignore[call-overload]
    assert run.returncode == 0, f"{command}\n{run.stdout[-3000:]}\n{run.stderr[-3000:]}"
    return str(run.stdout)


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with sdist and wheel, built from a copy of the sources; the wheel from the sdist."""
    folder = tmp_path_factory.mktemp("release")
    left_out = shutil.ignore_patterns(".*", "out", "build", "dist", "site", "*.egg-info", "__pycache__", "reference-*")
    shutil.copytree(ROOT, folder / "source", ignore=left_out)
    _run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", folder / "source")
    return folder / "dist"


def test_metadata_are_complete(release: Path) -> None:
    files = sorted(path.name for path in release.iterdir())
    assert files == [f"vllm_longmamba-{__version__}-py3-none-any.whl", f"vllm_longmamba-{__version__}.tar.gz"]
    _run(sys.executable, "-m", "twine", "check", "--strict", *release.iterdir())


def test_sdist_has_what_the_demo_needs(release: Path) -> None:
    with tarfile.open(release / f"vllm_longmamba-{__version__}.tar.gz") as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    model = {f"examples/passkey-mamba2-4m/{file.name}" for file in MODEL.iterdir()}
    assert {"Makefile", "LICENSE", "examples/demo.py", "examples/texts/haystack.txt", *model} <= names
    assert not any(name.startswith(("tests/", "benchmarks/")) for name in names)


@pytest.mark.engine
def test_wheel_serves_from_outside_of_the_checkout(release: Path, tmp_path: Path) -> None:
    """In an environment that has the wheel, and sees of this one's packages all but the project itself."""
    _run(sys.executable, "-m", "venv", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    [wheel] = release.glob("*.whl")
    _run(python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", wheel)
    site = Path(_run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # Names a folder only, whose own .pth files, the editable install among them, are then not read.
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    environment = {name: value for name, value in os.environ.items() if name not in OF_TESTS}
    (tmp_path / "ask.py").write_text(ASK)
    text = ROOT / "examples" / "texts" / "haystack.txt"
    output = _run(python, tmp_path / "ask.py", MODEL, text, cwd=tmp_path, env=environment)
    assert f"from {site / 'vllm_longmamba'}" in output
    assert "answer 48213" in output
    version = _run(tmp_path / "venv" / "bin" / "longmamba", "--version", cwd=tmp_path, env=environment)
    assert version.strip() == f"vllm-longmamba {__version__}"
