"""A job on a Ray cluster of this machine, two replicas of the example model: killed, interrupted, and started again."""

import os
import signal
import subprocess
from pathlib import Path

import pyarrow as pa
import pytest

from vllm_longmamba.summarize.ray_data import prompt_dataset, prompt_queue

from .real_jobs import QUESTION, command, rows_of, start_and_signal, user_environment, wait_until_gone

pytest.importorskip("ray", reason="needs Ray: pip install 'ray[data]>=2.50'")
pytestmark = [pytest.mark.engine, pytest.mark.slow]

# Two engines start at a time, on a machine that may have two cores.
START_SECONDS = 600


def test_signals_and_resume(tmp_path: Path, documents: dict[str, str]) -> None:
    """kill -9, then ctrl-C in the second run, then to the end: no row twice, none lost, no process left."""
    asked = ["--instruction", QUESTION, "--max-tokens", "5", "--fit", "map-reduce", "--concurrency", "2"]
    job_command = command(tmp_path, *asked, "--ray", "local", "--replicas", "2")
    output = tmp_path / "out.jsonl"
    before: dict[str, dict[str, object]] = {}
    for number, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)):
        job = start_and_signal(job_command, output, number, len(before), START_SECONDS)
        assert job.wait(120) == code
        wait_until_gone(tmp_path)
        rows = rows_of(output)
        assert before.items() <= rows.items()
        before = rows
        assert len(before) < len(documents) + 1
    subprocess.run(job_command, timeout=START_SECONDS, env=user_environment(tmp_path), check=True)
    wait_until_gone(tmp_path)
    rows = rows_of(output)
    assert before.items() <= rows.items()
    assert rows.keys() == documents.keys() | {"long"}
    assert all(row["error"] is None and row["finish_reason"] == "length" for row in rows.values())
    found = sum(str(rows[name]["summary"]).startswith(key) for name, key in documents.items())
    assert found >= 0.75 * len(documents)


def test_a_crash_of_the_task_that_takes_prompts() -> None:
    """What it had taken is lost, so that the dataset ends, where a job would wait for it for ever."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        prompts, table = prompt_queue(), pa.table({"number": [0]})
        prompts.put(table)
        taken = prompt_dataset(prompts).map(lambda row: {"process": os.getpid()}, num_cpus=0.01)
        rows = iter(taken.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0))
        os.kill(next(rows)["process"][0].as_py(), signal.SIGKILL)
        prompts.put_nowait_batch([table] * 5)
        # Ray drops what a task that is run again says first: here the error.
        with pytest.raises((StopIteration, RuntimeError)):
            next(rows)
    finally:
        ray.shutdown()
