"""Ends what a job started if the job itself is killed: an engine without its job would keep its memory for ever.

The watchdog is a process in a session of its own that runs this file. It knows the job's processes by their descent,
which it looks up once a second: vLLM and Ray overwrite the environment that the system shows of their processes, and
what is forked shares pipes and sessions with the job.
"""

import contextlib
import os
import subprocess
import sys
import time

import psutil

_INTERVAL_S = 1.0
_ENDING_ROUNDS = 50
_ENDING_INTERVAL_S = 0.1
# Python's own helper: once the others are gone it removes their shared memory, and ends.
_CLEANER = "multiprocessing.resource_tracker"


class Watchdog:
    """Watches this process until `stop`."""

    def __init__(self) -> None:
        command = [sys.executable, "-I", __file__, str(os.getpid())]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)

    def stop(self) -> None:
        """Watch no longer: nothing is left that would have to be ended."""
        self._process.kill()
        self._process.wait()


def watch(job: int) -> None:
    """Wait for the end of a process, however it comes, and end what descends from it."""
    try:
        parent = psutil.Process(job)
    except psutil.NoSuchProcess:
        # Killed before it has started anything.
        return
    family: set[psutil.Process] = set()
    while os.getppid() == job:
        family = grown(family | {parent}) - {parent}
        time.sleep(_INTERVAL_S)
    for _ in range(_ENDING_ROUNDS):
        family = grown(family)
        for process in family:
            with contextlib.suppress(psutil.Error):
                if _CLEANER not in " ".join(process.cmdline()):
                    process.kill()
        time.sleep(_ENDING_INTERVAL_S)


def grown(family: set[psutil.Process]) -> set[psutil.Process]:
    """Those of a family that still run, and what descends from them; psutil tells a process from a later namesake.

    Returns:
        The family without this process.
    """
    now: set[psutil.Process] = set()
    for process in family:
        with contextlib.suppress(psutil.Error):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                now |= {process, *process.children(recursive=True)}
    return {process for process in now if process.pid != os.getpid()}


if __name__ == "__main__":
    watch(int(sys.argv[1]))
