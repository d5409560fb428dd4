"""The server backend: retries, back-off, restarts, concurrency."""

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from vllm_longmamba.summarize import server as server_module
from vllm_longmamba.summarize.prompts import Prompt
from vllm_longmamba.summarize.records import Completion, JobStoppedError, RecordError
from vllm_longmamba.summarize.server import ServerBackend
from vllm_longmamba.summarize.settings import JobSettings, Sampling

from .conftest import EXAMPLE_MODEL, Job
from .documents import write_jsonl
from .stub_server import MODEL, StubServer, answer


def prompt(text: str) -> Prompt:
    return Prompt(text, text, None)


async def ask(server: StubServer, text: str, chat: bool = False, **options: Any) -> Completion:
    backend, _ = await connect(ServerOptions(server.url, **options), Sampling(max_tokens=5), concurrency=4)
    backend.chat = chat
    try:
        return await backend.complete(prompt(text))
    finally:
        await backend.close()


@pytest.mark.parametrize("chat", [False, True])
def test_an_answer(server: StubServer, chat: bool) -> None:
    text = "some words and more"
    said = answer(text)
    assert asyncio.run(ask(server, text, chat)) == Completion(said, len(text), len(said), "stop")


@pytest.mark.parametrize(("word", "times"), [("BUSY-TWICE", 3), ("ABORT-ONCE", 2)])
def test_tries_again(server: StubServer, word: str, times: int) -> None:
    assert asyncio.run(ask(server, word)).text == answer(word)
    assert server.requests[word] == times


def test_gives_up_on_one_prompt(server: StubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "_FIRST_DELAY_S", 0.001)
    with pytest.raises(RecordError, match=r"refused: .*this is refused"):
        asyncio.run(ask(server, "REFUSE"))
    with pytest.raises(RecordError, match=r"server error: 5 times .*inside"):
        asyncio.run(ask(server, "ALWAYS-500"))
    assert (server.requests["REFUSE"], server.requests["ALWAYS-500"]) == (1, 5)
    server.delay_s = 1.0
    with pytest.raises(RecordError, match=r"timeout: 5 times no answer in 0.05 s"):
        asyncio.run(ask(server, "slow", timeout_s=0.05))


def test_gives_up_on_the_server(server: StubServer) -> None:
    with pytest.raises(JobStoppedError, match="has no model 'other', but stub; see --model"):
        asyncio.run(ask(server, "x", model="other"))
    url = server.url
    server.stop()
    started = time.monotonic()
    with pytest.raises(JobStoppedError, match=r"is away since \d+ s \(--retry-for\)"):
        asyncio.run(connect(ServerOptions(url, retry_for_s=0.5), Sampling(), 1))
    assert 0.5 < time.monotonic() - started < 10


def test_what_the_server_says_of_its_model() -> None:
    async def found() -> tuple[ServerBackend, str]:
        backend, root = await connect(ServerOptions(server.url), Sampling(), 7)
        await backend.close()
        return backend, root

    with StubServer(root="folder", max_model_len=77) as server:
        backend, root = asyncio.run(found())
    assert (backend.model, backend.max_model_len, backend.concurrency, root) == (MODEL, 77, 7, "folder")


@pytest.mark.parametrize("concurrency", [1, 5])
def test_concurrency(job: Job, concurrency: int) -> None:
    job.server.delay_s = 0.02
    write_jsonl(job.folder / "in" / "rows.jsonl", ({"id": str(n), "text": f"text {n}"} for n in range(25)))
    assert job(concurrency=concurrency) == 0
    assert len(job.answers()) == 25
    assert job.server.most_at_once == concurrency


def test_the_tokenizer_of_the_served_model(tmp_path: Path) -> None:
    """A server that names a folder on this machine: tokens are counted before anything is sent."""
    with StubServer(root=str(EXAMPLE_MODEL), max_model_len=300) as server:
        job = Job(tmp_path, server)
        write_jsonl(
            tmp_path / "in" / "rows.jsonl", [{"id": "short", "text": "x" * 30}, {"id": "long", "text": "y " * 900}]
        )
        settings: dict[str, Any] = {"sampling": Sampling(max_tokens=60), "prompt_kind": "auto"}
        assert job(**settings) == 3
        assert job.answers()["long"].startswith("too long: 1808 tokens of prompt, and 240 fit beside 60 of answer")
        assert job.answers()["short"] == answer("x" * 30 + "\n\nTL;DR:")
        assert set(server.requests) == {"x" * 30 + "\n\nTL;DR:"}


def test_a_restart_in_the_middle(job: Job) -> None:
    """The server goes away at every tenth of the job, with requests under way, and comes back."""
    count = 90
    write_jsonl(job.folder / "in" / "rows.jsonl", ({"id": str(n), "text": f"text {n}"} for n in range(count)))
    servers = [job.server]
    job.server.delay_s = 0.01

    async def restart_often() -> None:
        for _ in range(3):
            served = sum(servers[-1].requests.values())
            while sum(servers[-1].requests.values()) < served + count // 10:
                await asyncio.sleep(0.005)
            await asyncio.to_thread(servers[-1].stop)
            await asyncio.sleep(0.1)
            servers.append(StubServer(port=servers[-1].port, delay_s=0.01))
            await asyncio.to_thread(servers[-1].start)

    def run_and_restart() -> int:
        import threading

        restarter = threading.Thread(target=lambda: asyncio.run(restart_often()), daemon=True)
        restarter.start()
        code = job(concurrency=8, retry_for_s=60.0)
        restarter.join(60)
        return code

    try:
        assert run_and_restart() == 0
    finally:
        servers[-1].stop()
    assert len(servers) == 4
    found = job.answers()
    assert found == {str(n): answer(f"text {n}\n\nTL;DR:") for n in range(count)}
