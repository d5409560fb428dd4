"""Ends what a job started if the job itself is killed: an engine without its job would keep its memory for ever.

The watchdog is a process in a session of its own that runs this file, without the project. It knows the job's
processes by their descent, which it looks up once a second: vLLM and Ray overwrite the environment that the system
shows of their processes, and what is forked shares pipes and sessions with the job.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time

_INTERVAL_S = 1.0
_ENDING_ROUNDS = 50
_ENDING_INTERVAL_S = 0.1
# Python's own helper: once the others are gone it removes their shared memory, and ends.
_CLEANER = b"multiprocessing.resource_tracker"

# Start time of each process, which tells it from a later one with its number.
Family = dict[int, int]


class Watchdog:
    """Watches this process until `stop`; does nothing where there is no /proc."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        if os.path.isdir("/proc/self"):
            command = [sys.executable, "-I", "-S", __file__, str(os.getpid())]
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)

    def stop(self) -> None:
        """Watch no longer: nothing is left that would have to be ended."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def watch(job: int) -> None:
    """Wait for the end of a process, however it comes, and end what descends from it.

    Args:
        job: number of the parent of this process.
    """
    family: Family = {}
    while os.getppid() == job:
        family = grown(family, job)
        time.sleep(_INTERVAL_S)
    for _ in range(_ENDING_ROUNDS):
        family = grown(family)
        left = [pid for pid in family if not _cleans_up(pid)]
        if not left:
            return
        for pid in left:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_ENDING_INTERVAL_S)


def grown(family: Family, *roots: int) -> Family:
    """Those of a family that still run, and every process that descends from them or from a root.

    Args:
        family: as it was.
        roots: further ancestors; not part of the family.

    Returns:
        The family without this process.
    """
    parents: dict[int, int] = {}
    starts: Family = {}
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        with contextlib.suppress(OSError):
            parent, start = _parent_and_start(pid)
            if parent is not None:
                parents[pid], starts[pid] = parent, start
    new = {pid: start for pid, start in family.items() if starts.get(pid) == start}
    # Children may have lower numbers than their parents.
    while True:
        more = {
            pid: starts[pid]
            for pid, parent in parents.items()
            if (parent in new or parent in roots) and pid not in new and pid != os.getpid()
        }
        if not more:
            return new
        new |= more


def _parent_and_start(pid: int) -> tuple[int | None, int]:
    """Number of the parent, None of a dead process that nobody has waited for; start time in ticks since boot."""
    with open(f"/proc/{pid}/stat", "rb") as stat:
        # proc(5); the name in parentheses may hold anything. The first field behind it is the third.
        fields = stat.read().rpartition(b")")[2].split()
    return (None if fields[0] in (b"Z", b"X") else int(fields[1])), int(fields[19])


def _cleans_up(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as line:
            return _CLEANER in line.read()
    except OSError:
        return True


if __name__ == "__main__":
    watch(int(sys.argv[1]))
