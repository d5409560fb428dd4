"""A failed start of an engine: one line with the root cause and the remedy."""

import subprocess
import sys

import pytest
from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from vllm_longmamba.commands.engine_errors import EngineStartError, explain, explained_start

POINTER = RuntimeError("Engine core initialization failed. See root cause above. Failed core proc(s): {}")
LOG = """INFO 11-29 10:00:00 [core.py:9] fine
(EngineCore_DP0 pid=12) ERROR 11-29 10:00:01 [core.py:1510] EngineCore failed to start.
(EngineCore_DP0 pid=12) ERROR 11-29 10:00:01 [core.py:1510] Traceback (most recent call last):
(EngineCore_DP0 pid=12) ERROR 11-29 10:00:01 [core.py:1510]   File "x.py", line 1, in f
(EngineCore_DP0 pid=12) ERROR 11-29 10:00:01 [core.py:1510] ValueError: {cause}
(EngineCore_DP0 pid=12) Process EngineCore_DP0:
(EngineCore_DP0 pid=12) Traceback (most recent call last):
(EngineCore_DP0 pid=12) ValueError: {cause}
(EngineCore_DP0 pid=12) RuntimeError: Worker initialization failed, see root cause
"""
MEMORY = (
    "Available memory on node 0 (1.0/23.0 GiB) on startup is less than desired CPU memory utilization (0.9, 20.0 GiB)."
)


@pytest.mark.parametrize(
    ("error", "said", "expected"),
    [
        (ValueError("no table. Make one."), "", "no table. Make one (--verbose shows the whole traceback)"),
        (KeyError("x"), "", "KeyError: 'x' (--verbose shows the whole traceback)"),
        (POINTER, LOG.replace("{cause}", "the cause"), "the cause (--verbose shows the whole traceback)"),
        (POINTER, "nothing", f"RuntimeError: {POINTER} (--verbose shows the whole traceback)"),
        (POINTER, LOG.replace("{cause}", MEMORY), f"{MEMORY} Say how many GiB the cache may take (export VLLM_CPU"),
        (ValueError("max_num_seqs (9) exceeds available Mamba cache blocks (3)"), "", "Run fewer requests at a time"),
    ],
    ids=["ours", "other", "child", "unknown", "memory", "blocks"],
)
def test_explain(error: Exception, said: str, expected: str) -> None:
    assert expected in explain(error, said)


def test_explain_names_the_argument_that_pydantic_refuses() -> None:
    @dataclass
    class Config:
        max_num_seqs: int

    with pytest.raises(ValidationError) as caught:
        TypeAdapter(Config).validate_python({"max_num_seqs": "many"})
    assert explain(caught.value, "").startswith("max_num_seqs: Input should be a valid integer")


START = """
import subprocess, sys
from vllm_longmamba.commands.engine_errors import EngineStartError, explained_start
kind, verbose = sys.argv[1:]
child = "import sys; print('begin', flush=True); sys.stderr.write(sys.argv[1])"
trouble = "ERROR 01-01 x\\nTraceback (most recent call last):\\nOSError: cause\\n"
try:
    with explained_start(verbose == "verbose"):
        subprocess.run([sys.executable, "-c", child, trouble])
        if kind == "fails":
            raise RuntimeError("Engine core initialization failed. See root cause above.")
        late = subprocess.Popen([sys.executable, "-c", "input(); print('late')"], stdin=subprocess.PIPE)
    print("started", flush=True)
    late.communicate(b"\\n")
except EngineStartError as error:
    print("one line:", error)
"""


@pytest.mark.parametrize("kind", ["fails", "works"])
@pytest.mark.parametrize("verbose", ["verbose", "brief"])
def test_what_is_shown(kind: str, verbose: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", START, kind, verbose], capture_output=True, text=True, check=True, timeout=60
    )
    assert ran.stderr.startswith("begin\n")
    if kind == "fails":
        assert ran.stdout.startswith("one line: cause")
        assert ("OSError: cause" in ran.stderr) == (verbose == "verbose")
        assert ("RuntimeError" in ran.stderr) == (verbose == "verbose")
    else:
        assert ran.stdout == "started\n"
        assert "OSError: cause\n" in ran.stderr
        assert ran.stderr.endswith("late\n")


def test_interrupts_pass() -> None:
    with pytest.raises(KeyboardInterrupt), explained_start():
        raise KeyboardInterrupt
    with pytest.raises(EngineStartError), explained_start():
        raise OSError("x")
