"""Starts `vllm serve` on a free port, waits until it answers, and ends it again."""

import os
import signal
import socket
import subprocess
import sysconfig
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# Local models need no hub; the CPU build takes half of the memory for its cache unless told how many GiB.
SERVER_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
STOP_GRACE_S = 10.0


class ServerError(RuntimeError):
    """A server that did not start, with the end of its log."""


@contextmanager
def running_server(model: str, arguments: list[str], log: Path, timeout_s: float = 240.0) -> Iterator[str]:
    """Run `vllm serve` while the block runs; the server is gone when the block is left, however that happens.

    Args:
        model: name or folder of the model.
        arguments: further arguments of `vllm serve`.
        log: file for the server's output.
        timeout_s: how long the server may take to start.

    Yields:
        The address of its OpenAI API.

    Raises:
        ServerError: it ended, or did not answer in time.
    """
    port = _free_port()
    vllm = Path(sysconfig.get_path("scripts")) / "vllm"
    command = [str(vllm), "serve", model, *arguments, "--host", "127.0.0.1", "--port", str(port)]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        # A group of its own, so that ctrl-C reaches only the caller, and the server's workers can be ended with it.
        server = subprocess.Popen(
            command,
            env=SERVER_ENVIRONMENT | os.environ,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait_until_healthy(server, port, log, timeout_s)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        _stop(server)


def log_tail(log: Path, lines: int = 30) -> str:
    """The last lines of a server's log."""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_healthy(server: subprocess.Popen[bytes], port: int, log: Path, timeout_s: float) -> None:
    # No proxy for a server on this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise ServerError(f"the server ended with exit code {server.returncode}; {log} ends with\n{log_tail(log)}")
        try:
            with opener.open(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.3)
    raise ServerError(f"the server did not answer within {timeout_s:.0f} s; {log} ends with\n{log_tail(log)}")


def _stop(server: subprocess.Popen[bytes]) -> None:
    # A second ctrl-C must not leave the server behind.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        if server.poll() is None:
            server.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                server.wait(STOP_GRACE_S)
        # Whatever is left of the group: nothing, as a rule.
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    finally:
        signal.signal(signal.SIGINT, before)
