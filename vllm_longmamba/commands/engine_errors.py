"""Why an engine did not start, in one line instead of the traceback of every process."""

import atexit
import contextlib
import os
import re
import secrets
import sys
import threading
import traceback
from collections import deque
from collections.abc import Iterator

_KEPT_LINES = 2000
# What begins the account of a failure: vLLM's log, or Python's own words.
_TROUBLE = re.compile(r"\bERROR \d\d-\d\d |Traceback \(most recent call last\)|^Process \w+:")
_EXCEPTION = re.compile(
    r"(?:^|\] |\) )(?:[A-Za-z_]\w*\.)*([A-Z]\w*(?:Error|Exception|Interrupt|Exit|Failure)): (\S.*)$"
)
# These say only that another process failed.
_POINTERS = re.compile(r"root cause|initialization failed|failed to start|Engine core|EngineCore")
_REMEDIES = {
    r"Available memory on node .* on startup": "Say how many GiB the cache may take (export VLLM_CPU_KVCACHE_SPACE=1), "
    "or ask for a smaller share of the memory (--engine-args '{\"gpu_memory_utilization\": 0.5}')",
    r"on kv cache allocation is less than": "Set VLLM_CPU_KVCACHE_SPACE to fewer GiB than are free",
    r"exceeds available Mamba cache blocks": "Run fewer requests at a time (--engine-args '{\"max_num_seqs\": 16}'), "
    "or give vLLM more memory",
    r"(?i)out of memory|Free memory on device|No available memory for the cache": "Free the device's memory, or change "
    "the share that vLLM takes (--engine-args '{\"gpu_memory_utilization\": 0.8}')",
    r"KV cache .* is larger than|larger than the available KV cache": "Lower --max-model-len",
    r"No package metadata was found for vllm": "Run python examples/name_vllm_cpu.py in this environment",
}


class EngineStartError(ValueError):
    """An engine did not start; the message is one line with the root cause and a remedy."""


@contextlib.contextmanager
def explained_start(verbose: bool = False) -> Iterator[None]:
    """Start an engine in this block: a failure is raised as `EngineStartError`, its traceback is not shown.

    What this process and those that it starts here print goes to standard error as before; from the first sign of
    trouble it is held back, and shown only if the engine starts all the same.

    Args:
        verbose: show everything as it comes, and the traceback too.

    Raises:
        EngineStartError: the block failed.
    """
    output = _Output(may_hold=not verbose)
    try:
        yield
    except Exception as error:
        said = output.end(show=False)
        if verbose:
            traceback.print_exc()
        raise EngineStartError(explain(error, said)) from None
    except BaseException:
        output.end(show=False)
        raise
    output.end(show=True)


def explain(error: BaseException, said: str) -> str:
    """One line: why an engine did not start (`error`, while its processes `said`), and what to do."""
    cause = _words(type(error).__name__, str(error))
    # Pydantic packs the message of a ValueError into several lines of its own.
    if callable(errors := getattr(error, "errors", None)) and (details := errors()):
        cause = str(details[0]["msg"])
        # Its own messages do not name the argument.
        place = ".".join(map(str, details[0].get("loc", ())))
        is_ours = cause.startswith("Value error, ") or not place
        cause = cause.removeprefix("Value error, ") if is_ours else f"{place}: {cause}"
    if _POINTERS.search(cause):
        # The last exception in the output that does not point to another.
        causes = [found.groups() for line in said.splitlines() if (found := _EXCEPTION.search(line))]
        causes = [(name, message) for name, message in causes if not _POINTERS.search(message)]
        cause = _words(*causes[-1]) if causes else cause
    cause = " ".join(cause.split())[:1000].rstrip(".")
    remedy = next((remedy for pattern, remedy in _REMEDIES.items() if re.search(pattern, cause)), None)
    return f"{cause}. {remedy}." if remedy else f"{cause} (--verbose shows the whole traceback)"


def _words(name: str, message: str) -> str:
    return message if message and name in ("ValueError", "OSError") else f"{name}: {message}"


class _Output:
    """Standard output and error of this process and its children, through a pipe to the real standard error."""

    def __init__(self, may_hold: bool) -> None:
        # From the first sign of trouble on.
        self._trouble: deque[str] = deque(maxlen=_KEPT_LINES)
        self._may_hold, self._show_held = may_hold, False
        self._mark = secrets.token_hex()
        self._drained = threading.Event()
        _flush()
        self._stdout, self._stderr = os.dup(1), os.dup(2)
        reading, self._writing = os.pipe()
        os.dup2(self._writing, 1)
        os.dup2(self._writing, 2)
        # As long as a child lives: it keeps the pipe as its own output.
        pump = threading.Thread(target=self._pump, args=(reading,), name="engine-output", daemon=True)
        pump.start()
        # The last words of children that have ended.
        atexit.register(pump.join, 1.0)

    def end(self, show: bool) -> str:
        """Give this process its own output back, and show what was held back or not; what was printed in trouble."""
        _flush()
        os.dup2(self._stdout, 1)
        os.dup2(self._stderr, 2)
        self._show_held = show
        os.write(self._writing, f"{self._mark}\n".encode())
        os.close(self._writing)
        self._drained.wait(5.0)
        return "".join(self._trouble)

    def _pump(self, reading: int) -> None:
        # As it comes: a line may end with a carriage return, as those of progress bars do.
        with open(reading, encoding="utf-8", errors="replace", newline="") as lines:
            for line in lines:
                text, mark, _ = line.partition(self._mark)
                if not self._drained.is_set() and (self._trouble or _TROUBLE.search(text)):
                    self._trouble.append(text)
                    text = "" if self._may_hold else text
                if mark and self._may_hold and self._show_held:
                    text = "".join(self._trouble) or text
                with contextlib.suppress(OSError), open(self._stderr, "w", encoding="utf-8", closefd=False) as shown:
                    shown.write(text)
                if mark:
                    self._drained.set()


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
