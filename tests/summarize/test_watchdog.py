"""The process that ends what a killed job leaves behind."""

import signal
import subprocess
import sys
import time

import psutil

from vllm_longmamba.summarize.watchdog import grown

SECONDS = 20.0
# Starts a process that hides as well as it can, with a child of its own, and a fork; prints their numbers and waits.
JOB = """
import os, subprocess, sys, time
from vllm_longmamba.summarize.watchdog import Watchdog
watchdog = Watchdog()
script = "import subprocess, time; print(subprocess.Popen(['sleep', '300']).pid, flush=True); time.sleep(300)"
hidden = subprocess.Popen([sys.executable, "-S", "-c", script], env={}, start_new_session=True, stdout=subprocess.PIPE)
grandchild = int(hidden.stdout.readline())
forked = os.fork()
if not forked:
    time.sleep(300)
time.sleep(2)
print(hidden.pid, grandchild, forked, flush=True)
sys.stdin.readline()
watchdog.stop()
os._exit(0)
"""


def started() -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """A job, and the processes that it started, after its watchdog has had time to see them."""
    job = subprocess.Popen([sys.executable, "-c", JOB], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert job.stdout is not None
    return job, [psutil.Process(int(pid)) for pid in job.stdout.readline().split()]


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that run; a dead one may wait for somebody to ask for its exit code."""
    return [process for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def test_kill() -> None:
    """Everything that descends from the job goes with it, and nothing else."""
    bystander = subprocess.Popen(["sleep", "300"])
    job, family = started()
    try:
        assert len(alive(family)) == 3
        job.send_signal(signal.SIGKILL)
        deadline = time.monotonic() + SECONDS
        while left := alive(family):
            assert time.monotonic() < deadline, left
            time.sleep(0.05)
        assert bystander.poll() is None
    finally:
        end(job, bystander, *alive(family))


def test_stop() -> None:
    """After `stop` the end of the job ends nothing."""
    job, family = started()
    try:
        assert job.stdin is not None
        job.stdin.close()
        assert job.wait(SECONDS) == 0
        time.sleep(2)
        assert len(alive(family)) == 3
    finally:
        end(job, *alive(family))


def test_grown() -> None:
    """A family gains the children of its members, and loses who has ended or only bears the number of one who has."""
    child = subprocess.Popen(["sleep", "300"])
    process = psutil.Process(child.pid)
    try:
        family = grown({psutil.Process()})
        assert process in family
        assert psutil.Process() not in family
        other = psutil.Process(child.pid)
        other._ident = (child.pid, -1.0)
        assert grown({process}) == {process}
        assert grown({other}) == set()
    finally:
        end(child)
    assert process not in grown(family)


def end(*processes: subprocess.Popen[str] | subprocess.Popen[bytes] | psutil.Process) -> None:
    """Kill processes that may have ended."""
    for process in processes:
        try:
            process.kill()
            process.wait()
        except psutil.NoSuchProcess:
            continue
