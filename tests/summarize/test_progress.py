"""What a job shows of its progress, and what it reports at the end."""

import errno
import io
import sys
from pathlib import Path

import pytest
from rich.console import Console

from vllm_longmamba.summarize import progress as progress_module
from vllm_longmamba.summarize.progress import Progress, duration, say
from vllm_longmamba.summarize.records import Row


class Clock:
    """Takes the place of the module `time`."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress_module, "time", clock)
    return clock


def a_row(**more: object) -> Row:
    return Row("a", prompt_tokens=900, output_tokens=100, **more)  # type: ignore[arg-type]


def test_state(clock: Clock) -> None:
    """Documents/s, tokens/s, and the time left by the bytes that this run has answered, not those of earlier ones."""
    progress = Progress(Console(file=io.StringIO()))
    progress.total_bytes = 1000
    progress.begin()
    assert progress.state() == "0 documents, 0/s, 0 tokens/s"
    progress.skipped(weight=500, repeated=False)
    clock.now = 10.0
    for _ in range(4):
        progress.answered(a_row(), weight=25)
    progress.answered(a_row(error="too long: by far"), weight=0)
    assert progress.state() == "5 documents, 0.5/s, 500 tokens/s, 1 errors, 1 done before, ETA 40.0 s"


def test_a_tiny_first_document_tells_no_time(clock: Clock) -> None:
    """Before a hundredth of the bytes to answer is answered there is no ETA; what was done before does not count."""
    progress = Progress(Console(file=io.StringIO()))
    progress.total_bytes = 3000
    progress.begin()
    progress.skipped(weight=1000, repeated=False)
    clock.now = 10.0
    progress.answered(a_row(), weight=20)
    assert "ETA" not in progress.state()
    progress.answered(a_row(), weight=20)
    assert progress.state().endswith("ETA 8 min 10 s")


def test_report(clock: Clock) -> None:
    progress = Progress(Console(file=io.StringIO()))
    progress.begin()
    progress.answered(a_row(dropped_tokens=7), weight=1)
    progress.answered(a_row(steps=[{}]), weight=1)
    progress.answered(a_row(error="refused: no"), weight=1)
    progress.skipped(weight=1, repeated=True)
    clock.now = 100.0
    progress.end()
    clock.now = 900.0
    assert progress.report() == [
        "3 rows written in 1 min 40 s: 2,700 prompt and 300 output tokens, 30 tokens/s",
        "1 left out: the same id and text once more",
        "1 cut off to fit",
        "1 answered by map-reduce",
        "1 error rows: 1 refused",
    ]


@pytest.mark.parametrize("terminal", [True, False], ids=["bar", "lines"])
def test_what_is_shown(clock: Clock, terminal: bool) -> None:
    """A bar on a terminal, a line a minute in a log."""
    shown = io.StringIO()
    progress = Progress(Console(file=shown, force_terminal=terminal, width=150))
    progress.total_bytes = 100
    progress.begin()
    clock.now = 30.0
    progress.answered(a_row(), weight=10)
    clock.now = 61.0
    progress.answered(a_row(), weight=10)
    progress.end()
    assert "2 documents, 0.0328/s, 33 tokens/s, ETA 4 min 04 s" in shown.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"), [(5.62, "5.6 s"), (59.9, "59.9 s"), (184.2, "3 min 04 s"), (3720, "1 h 02 min")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


class Lost(io.StringIO):
    """A file that nothing can be written to."""

    def __init__(self, error: OSError) -> None:
        super().__init__()
        self.error = error

    def flush(self) -> None:
        raise self.error


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), BrokenPipeError()], ids=["disk", "pipe"])
def test_nowhere_to_print(error: OSError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a full disk, or into a pipe that nobody reads: a job whose log is lost goes on."""
    console = Console(file=Lost(error))
    # rich takes any broken pipe for that of the standard output, which it redirects.
    with (tmp_path / "stdout").open("w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        say(console, "a line")
        say(console, "another one")
