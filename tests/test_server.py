"""One real `vllm serve` with a LongMamba model: HTTP, bad requests, many clients, the end."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import pytest
from engine.conftest import WRITERS
from engine.harness import filters_of, write_table
from references.reference_lm import reference_logprobs
from tiny_models import random_token_ids

pytestmark = pytest.mark.engine

MAX_MODEL_LEN = 1024
# Several times what a machine needs that does nothing else.
START_SECONDS = 600
ANSWER_SECONDS = 300
STOP_SECONDS = 120


@dataclass(frozen=True)
class Server:
    """A running server."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def post(self, prompt: Any, **body: Any) -> tuple[int, Any]:
        """(HTTP status, parsed body) of a completion."""
        content = {"model": "tiny", "prompt": prompt, "temperature": 0, "max_tokens": 8, "ignore_eos": True} | body
        request = urllib.request.Request(
            f"{self.url}/v1/completions",
            json.dumps(content).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def tokens(self, prompt: list[int]) -> list[int]:
        """Greedy continuation of a prompt."""
        status, answer = self.post(prompt, return_token_ids=True)
        assert status == 200, answer
        token_ids: list[int] = answer["choices"][0]["token_ids"]
        return token_ids

    def is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as response:
                return bool(response.status == 200)
        except OSError:
            return False

    def stop(self) -> int:
        """Ask the server to end, as a service manager does; its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=STOP_SECONDS)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def server_environment(folder: Path) -> dict[str, str]:
    """Environment of a server: offline, a small cache, the engine in a process of its own, as users have it."""
    environment = dict(os.environ, VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="INFO", HF_HUB_OFFLINE="1")
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    try:
        metadata.version("vllm")
    except metadata.PackageNotFoundError:
        # The vllm command asks for the version of "vllm", but the CPU build is a distribution named "vllm-cpu".
        version = f"{metadata.version('vllm-cpu').removesuffix('+cpu')}+cpu"
        second_name = folder / f"vllm-{version}.dist-info"
        second_name.mkdir()
        (second_name / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
        environment["PYTHONPATH"] = os.pathsep.join([str(folder), *filter(None, [environment.get("PYTHONPATH")])])
    return environment


@contextmanager
def serving(model: Path, folder: Path, *arguments: str) -> Iterator[Server]:
    """`vllm serve MODEL --model-impl longmamba`, eagerly in float32; its log goes to a folder."""
    port = free_port()
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(model), "--model-impl", "longmamba"]
    command += ["--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--max-model-len", str(MAX_MODEL_LEN), "--enforce-eager", *arguments]
    log = folder / "server.log"
    with log.open("wb") as output:
        environment = server_environment(folder)
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT, cwd=folder)
    running = Server(process, f"http://127.0.0.1:{port}", log)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not running.is_healthy():
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"the server did not start:\n{log.read_text(errors='replace')[-4000:]}")
            time.sleep(0.5)
        yield running
    finally:
        if process.poll() is None:
            children = psutil.Process(process.pid).children(recursive=True)
            process.terminate()
            try:
                process.wait(timeout=STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            # Killed while it starts, a server leaves its engine behind.
            for child in children:
                with suppress(psutil.NoSuchProcess):
                    child.kill()


def write_model(family: str, folder: Path) -> tuple[Path, Any]:
    """A tiny model with its table beside the weights, and the table."""
    model = WRITERS[family](folder / "model")
    table = write_table(model, folder / "table.safetensors")
    (folder / "table.safetensors").rename(model / "longmamba.safetensors")
    return model, table


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that takes prompts in parts."""
    folder = tmp_path_factory.mktemp("server")
    model, _ = write_model("mamba2", folder)
    with serving(model, folder, "--max-num-seqs", "16", "--max-num-batched-tokens", "512") as running:
        yield running


def test_completion(server: Server) -> None:
    status, answer = server.post("The pass key is ", max_tokens=5)
    assert status == 200, answer
    assert answer["usage"] == {"prompt_tokens": 16, "completion_tokens": 5, "total_tokens": 21} | {
        name: value for name, value in answer["usage"].items() if name.endswith("details")
    }
    assert answer["choices"][0]["finish_reason"] == "length"
    assert isinstance(answer["choices"][0]["text"], str)


def test_log_names_the_table(server: Server) -> None:
    log = server.log.read_text(errors="replace")
    assert "LongMamba: thresholds from" in log
    assert "longmamba.safetensors (training length 96" in log
    assert "Resolved architecture: LongMamba2ForCausalLM" in log


def test_prompt_beyond_max_model_len(server: Server) -> None:
    for length in (MAX_MODEL_LEN + 1, 5000):
        status, answer = server.post(random_token_ids(length))
        assert status == 400, answer
        assert str(MAX_MODEL_LEN) in answer["error"]["message"]
        assert str(length) in answer["error"]["message"]
    assert server.is_healthy()
    assert len(server.tokens(random_token_ids(MAX_MODEL_LEN - 8))) == 8


def test_wrong_parameter(server: Server) -> None:
    status, answer = server.post([1, 2, 3], max_tokens=-1)
    assert status == 400
    assert "max_tokens" in answer["error"]["message"]
    assert len(server.tokens([1, 2, 3])) == 8


def test_many_clients_get_what_one_gets(server: Server) -> None:
    lengths = [1, 2, 95, 96, 97, 128, 160, 199, 256, 333, 401, 511, 512, 513, 700, 1000]
    prompts = [random_token_ids(length, seed=length) for length in lengths]
    alone = [server.tokens(prompt) for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as clients:
        together = list(clients.map(server.tokens, prompts))
    assert together == alone
    assert len({tuple(tokens) for tokens in alone}) > len(prompts) // 2


# The last test of this file: it ends the server.
def test_sigterm_ends_the_server(server: Server) -> None:
    children = psutil.Process(server.process.pid).children(recursive=True)
    assert children, "the engine has a process of its own"
    assert server.stop() in (0, -signal.SIGTERM)
    _, left = psutil.wait_procs(children, timeout=STOP_SECONDS)
    assert left == []
    assert not server.is_healthy()
    log = server.log.read_text(errors="replace")
    assert "Application shutdown complete" in log
    # vLLM itself may log that its engine went away first; no line of ours may be part of an error.
    assert "/vllm_longmamba/" not in log


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mamba1", "mamba2", "zamba2", "granite_hybrid"])
def test_data_parallel(family: str, tmp_path: Path) -> None:
    """Two engines share the requests; each token is the likeliest of the independent reference."""
    model, table = write_model(family, tmp_path)
    prompts = [random_token_ids(length, seed=length) for length in (64, 97, 200, 333, 500, 640, 700, 900)]
    arguments = ["--data-parallel-size", "2", "--max-num-seqs", "4", "--max-num-batched-tokens", "128"]
    with serving(model, tmp_path, *arguments) as running, ThreadPoolExecutor(len(prompts)) as clients:
        answers = list(clients.map(running.tokens, prompts))
        log = running.log.read_text(errors="replace")
    assert "EngineCore_DP1" in log
    for prompt, answer in zip(prompts, answers, strict=True):
        filters = filters_of(table, len(prompt))
        logprobs = reference_logprobs(model, prompt + answer, prompt_length=len(prompt), filters=filters)
        given = logprobs[len(prompt) - 1 : -1]
        chosen = given[range(len(answer)), answer]
        assert (given.max(-1).values - chosen).max() < 2e-3
