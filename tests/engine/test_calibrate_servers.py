"""Two `vllm serve` of a model without a table, started at the same time, from an empty cache."""

import json
import os
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from example_modules import load_example
from test_server import server_environment
from tiny_models import random_token_ids, write_mamba2_original

from vllm_longmamba.tables import load_table

pytestmark = pytest.mark.engine

PROMPT = random_token_ids(700, seed=3)


def completion(address: str, model: Path) -> list[int]:
    """Greedy tokens of a server."""
    body = {"model": str(model), "prompt": PROMPT, "temperature": 0, "max_tokens": 8, "ignore_eos": True}
    request = urllib.request.Request(
        f"{address}/completions",
        json.dumps(body | {"return_token_ids": True}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        tokens: list[int] = json.load(response)["choices"][0]["token_ids"]
        return tokens


@pytest.mark.slow
def test_two_servers_start_without_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serving = load_example("serving")
    model = write_mamba2_original(tmp_path / "model")
    own = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    monkeypatch.setenv("VLLM_CACHE_ROOT", os.environ.get("VLLM_CACHE_ROOT", str(own / "vllm")))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # As users have it: the engine in a process of its own.
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    for name, value in server_environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    options = {"longmamba": {"train_length": 512}}
    arguments = ["--model-impl", "longmamba", "--additional-config", json.dumps(options), "--dtype", "float32"]
    arguments += ["--max-model-len", "2048", "--max-num-seqs", "16", "--enforce-eager"]
    arguments += ["--gpu-memory-utilization", "0.1"]
    logs = [tmp_path / "first.log", tmp_path / "second.log"]
    servers = [serving.running_server(str(model), arguments, log) for log in logs]
    with ExitStack() as stack:
        with ThreadPoolExecutor(2) as pool:
            addresses = list(pool.map(lambda server: server.__enter__(), servers))
        for server in servers:
            stack.push(server.__exit__)
        assert completion(addresses[0], model) == completion(addresses[1], model)
    (path,) = (tmp_path / "cache" / "vllm_longmamba").iterdir()
    assert load_table(path).metadata.train_length == 512
    texts = [log.read_text(errors="replace") for log in logs]
    assert all("LongMamba: no threshold table for" in text for text in texts)
    assert any(f"global; stored in {path}" in text for text in texts)
    for text in texts:
        # One calibrates while the other does, or finds what the other has just stored.
        assert ("LongMamba: calibrated in" in text) != ("made at an earlier start" in text)
        # vLLM's CPU worker warns at each call.
        assert "torch.set_num_threads" not in text
