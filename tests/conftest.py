"""Settings of every test: offline, a small cache, the engine in the test's own process."""

import os
import sys
from collections.abc import Iterator

import hypothesis
import pytest

# A busy machine must not make a test fail.
hypothesis.settings.register_profile("without-deadline", deadline=None)
hypothesis.settings.load_profile("without-deadline")

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
# One process: no start-up cost per engine, and errors reach the test as they are.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
# Tensor-parallel workers are children of that process, which may have used the GPU already.
os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")

# make test runs several workers: each has one thread of each library, on whichever core is free.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("NUMBA_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def _vllm_reads_its_variables_again() -> None:
    """An engine makes vLLM keep its environment variables; tests set others later in the same process."""
    if "vllm.envs" in sys.modules:
        sys.modules["vllm.envs"].disable_envs_cache()


@pytest.fixture(scope="session", autouse=True)
def _vllm_inspects_models_here(request: pytest.FixtureRequest) -> Iterator[None]:
    """For each architecture that its cache does not know, vLLM starts a process, which imports it: 10 s of a core.

    That keeps CUDA out of the asking process, which is no matter on a CPU.
    """
    import torch

    if torch.cuda.is_available() or not any(item.get_closest_marker("engine") for item in request.session.items):
        yield
        return
    from vllm.model_executor.models import registry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_run_in_subprocess", lambda inspect: inspect())
        yield


# These files come first. The long ones, so that at the end no worker waits for one of them; and those that mostly wait
# for timers and other processes, so that they leave the cores to engines that start meanwhile.
FIRST = [
    "tests/engine/test_defaults.py",
    "tests/engine/test_decimamba_defaults.py",
    "tests/summarize/test_kills.py",
    "tests/summarize/test_server.py",
    "tests/summarize/test_watchdog.py",
    "tests/engine/test_calibrate_at_start.py",
    "tests/evaluate/test_eval_commands.py",
    "tests/engine/test_calibrate_servers.py",
    "tests/test_server.py",
    "tests/engine/test_decimamba.py",
    "tests/engine/test_tensor_parallel.py",
    "tests/engine/test_exactness.py",
    "tests/engine/test_passkey.py",
    "tests/summarize/test_engine.py",
    "tests/kernels/test_interpreter.py",
]


def _place(item: pytest.Item) -> int:
    file = item.nodeid.split("::")[0]
    return FIRST.index(file) if file in FIRST else len(FIRST) + (item.get_closest_marker("engine") is None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the files, engines first, and skip the tests that need a GPU where there is none."""
    import torch

    items.sort(key=_place)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
