"""What README, CONTRIBUTING and docs/ tell people to type: it parses, names files that exist, and, slow, it runs."""

import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import takewhile
from pathlib import Path

import pytest
import typer
from documents import PAGES, ROOT, Command, Snippet, all_commands, links, steps
from example_modules import load_example

from vllm_longmamba import decimamba_options
from vllm_longmamba.cli import app
from vllm_longmamba.options import options_from_config

serving = load_example("serving")
# Minutes to tens of minutes each; these have tests of their own.
LONG = (("longmamba", "tune"), ("python", "examples/decimamba.py"))
CLIENTS = ("examples/serve_client.py", "--base-url")
DEFAULT_ADDRESS = "http://localhost:8000/v1"


PAGE = """# Page

    pip install it  # first

Text, not
    a block.

```python
x = 1
```

A [link](there.md) and `[no](link)`.

    A=1 make it \\
        --quickly

    make more

```json
make nothing
```

```python
y = x
```
"""


def test_commands_are_found() -> None:
    assert [command.words[1] for command in all_commands("make")][:2] == ["demo", "test"]
    assert len(all_commands("longmamba")) > 10
    assert len(all_commands("vllm")) > 5


def test_blocks_are_told_apart(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    assert steps(page) == [
        Command("page.md", ("pip", "install", "it")),
        Snippet("page.md", "x = 1\n"),
        Command("page.md", ("make", "it", "--quickly")),
        Command("page.md", ("make", "more")),
        Snippet("page.md", "x = 1\ny = x\n"),
    ]
    assert links(page) == ["there.md"]


def _parse(words: Sequence[str]) -> None:
    """Parse the words of a `longmamba` command without running it."""
    parser, context = typer.main.get_command(app), None
    while commands := getattr(parser, "commands", None):
        context = parser.make_context(words[0], list(words[1:]), parent=context)
        parser, words = commands[words[1]], words[1:]
    parser.make_context(words[0], list(words[1:]), parent=context)


@pytest.mark.parametrize("command", all_commands("longmamba"), ids=lambda command: command.text)
def test_longmamba_commands_parse(command: Command) -> None:
    try:
        _parse(command.words)
    except typer.BadParameter as error:
        # A placeholder, or a file that an earlier command of the page makes.
        if "does not exist" not in error.message:
            raise


@pytest.mark.parametrize(
    "words",
    [("evil",), ("calibrate", "M", "--nope"), ("calibrate", "M", "--sequences", "five"), ("eval", "passkey")],
    ids=["command", "option", "value", "missing"],
)
def test_wrong_commands_do_not_parse(words: tuple[str, ...]) -> None:
    # typer has a click of its own, or not: BadParameter is a UsageError of whichever it has.
    with pytest.raises((KeyError, typer.BadParameter.__bases__[0])):
        _parse(("longmamba", *words))


@pytest.mark.parametrize(
    "command",
    [command for command in all_commands("vllm") if "--additional-config" in command.words],
    ids=lambda command: command.text,
)
def test_options_are_known(command: Command) -> None:
    given = json.loads(command.words[command.words.index("--additional-config") + 1])
    options_from_config(given)
    decimamba_options.options_from_config(given)


@pytest.mark.parametrize("program", ["python", "bash"])
def test_scripts_exist(program: str) -> None:
    scripts = [command for command in all_commands(program) if command.words[1].endswith((".py", ".sh"))]
    assert scripts
    for command in scripts:
        assert (ROOT / command.words[1]).is_file(), command.text


@pytest.mark.parametrize("page", [*ROOT.glob("*.md"), *ROOT.glob("examples/**/*.md")], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    # Those within docs/ are checked by `mkdocs build --strict`.
    for target in links(page):
        if not target.startswith(("http://", "https://", "#")):
            assert (page.parent / target.partition("#")[0]).exists(), f"{page.name}: {target}"


def _runnable(page: Path) -> list[Command | Snippet]:
    """Up to the first command that takes long: what follows builds on its output."""
    shorter = takewhile(lambda step: isinstance(step, Snippet) or step.words[:2] not in LONG, steps(page))
    return [step for step in shorter if isinstance(step, Snippet) or _runs_on_a_cpu(step)]


def _runs_on_a_cpu(command: Command) -> bool:
    if ("--ray" in command.words or "examples/ray_summarize.py" in command.words) and importlib.util.find_spec(
        "ray"
    ) is None:
        # tests/summarize/test_ray.py is skipped then, too.
        return False
    program, argument = command.words[:2]
    known = program == "longmamba" or (program == "python" and argument.startswith(("examples/", "-m")))
    tests = argument == "-m" and command.words[2] in ("pytest", "nltk.downloader")
    serves = program == "vllm" and argument == "serve"
    return (known or serves) and not tests and command.is_concrete


# What conftest.py sets for engines in the test's own process.
OF_TESTS = ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_WORKER_MULTIPROC_METHOD", "VLLM_LOGGING_LEVEL")


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: it looks like a clone, with an out/ of its own and the environment of a user."""
    for path in ROOT.iterdir():
        if not path.name.startswith(".") and path.name not in ("out", "build", "dist", "site"):
            (tmp_path / path.name).symlink_to(path)
    for name in OF_TESTS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.parametrize("page", [page for page in PAGES if _runnable(page)], ids=lambda page: page.stem)
def test_page_runs_from_top_to_bottom(page: Path, clone: Path) -> None:
    """On a free port instead of 8000; a server runs until the next command that is not its client."""
    with ExitStack() as server:
        address = ""
        for step in _runnable(page):
            if isinstance(step, Command) and step.words[0] == "vllm":
                server.close()
                _, _, model, *arguments = step.words
                started = serving.running_server(model, arguments, clone / "out" / "server.log", timeout_s=600)
                address = server.enter_context(started)
                continue
            words = list(_words(step, address))
            if not any(word in CLIENTS for word in words):
                server.close()
            run = subprocess.run(words, capture_output=True, text=True, check=False)
            assert run.returncode == 0, f"{step.text}\n{run.stdout[-2000:]}\n{run.stderr[-4000:]}"


def _words(step: Command | Snippet, address: str) -> Iterator[str]:
    if isinstance(step, Snippet):
        yield from (sys.executable, "-c", step.code)
        return
    yield from (word.replace(DEFAULT_ADDRESS, address) for word in step.words)
    if CLIENTS[0] in step.words and "--base-url" not in step.words:
        yield from ("--base-url", address)
