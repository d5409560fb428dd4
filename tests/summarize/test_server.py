"""The server backend: retries, back-off, restarts, concurrency."""

import asyncio
import io
import resource
from pathlib import Path
from typing import Any

import pytest
import tenacity
from rich.console import Console

from vllm_longmamba.summarize import server as server_module
from vllm_longmamba.summarize.prompts import Prompt
from vllm_longmamba.summarize.records import Completion, JobStoppedError, RecordError
from vllm_longmamba.summarize.served import ServedModel, retry_after
from vllm_longmamba.summarize.server import ServerBackend
from vllm_longmamba.summarize.settings import JobSettings, Sampling

from .conftest import EXAMPLE_MODEL, Job
from .documents import write_jsonl
from .stub_server import MODEL, ODD_ANSWERS, StubServer, answer

SILENT = Console(file=io.StringIO())


def settings(url: str, **options: Any) -> JobSettings:
    more: dict[str, Any] = {"sampling": Sampling(max_tokens=5)} | options
    return JobSettings(inputs=("in",), output=Path("out.jsonl"), base_url=url, **more)


async def ask(server: StubServer, *texts: str, chat: bool = False, **options: Any) -> Completion:
    """The last answer."""
    backend = ServerBackend(settings(server.url, **options))
    try:
        await backend.connect(SILENT)
        for text in texts:
            completion = await backend.complete(Prompt(text, text, None, chat))
        return completion
    finally:
        await backend.close()


def connected(url: str, **options: Any) -> tuple[ServedModel, ServerBackend]:
    async def found() -> tuple[ServedModel, ServerBackend]:
        backend = ServerBackend(settings(url, **options))
        try:
            return await backend.connect(SILENT), backend
        finally:
            await backend.close()

    return asyncio.run(found())


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "_PAUSE", tenacity.wait_random(0.001, 0.01))


@pytest.mark.parametrize("chat", [False, True])
def test_an_answer(server: StubServer, chat: bool) -> None:
    text = "some words and more"
    said = answer(text)
    assert asyncio.run(ask(server, text, chat=chat)) == Completion(said, len(text), len(said), "stop")
    assert asyncio.run(ask(server, "NO-USAGE")).output_tokens == 0
    assert asyncio.run(ask(server, "a SURROGATE")).text.startswith("a ?")


@pytest.mark.parametrize(("word", "times"), [("BUSY-TWICE", 3), ("ABORT-ONCE", 2)])
def test_tries_again(server: StubServer, word: str, times: int) -> None:
    assert asyncio.run(ask(server, word)).text == answer(word)
    assert server.requests[word] == times


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("kind", ["SECONDS", "DATE"])
def test_waits_as_long_as_the_server_asks(
    server: StubServer, status: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []

    async def sleep(seconds: float) -> None:
        waited.append(seconds)

    monkeypatch.setattr(server_module, "_sleep", sleep)
    assert asyncio.run(ask(server, f"LATER-{status}-{kind}")).finish_reason == "stop"
    (seconds,) = waited
    assert seconds == 1.0 if kind == "SECONDS" else 0 < seconds <= 2


def test_no_pause_of_a_day(server: StubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []

    async def sleep(seconds: float) -> None:
        waited.append(seconds)

    monkeypatch.setattr(server_module, "_sleep", sleep)
    assert asyncio.run(ask(server, "NOT-TODAY", retry_for_s=30.0)).finish_reason == "stop"
    assert waited == [30.0]


def test_as_many_files_as_connections(server: StubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise documents could not be opened, and would be error rows."""
    limits: list[tuple[int, int]] = [(1024, 4096)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: limits.append(new))
    connected(server.url, concurrency=700)
    assert len(limits) == 1
    connected(server.url, concurrency=2000)
    assert limits[1:] == [(2256, 4096)]
    with pytest.raises(ValueError, match=r"5256 files must be open at a time, and 4096 may be .* lower --concurrency"):
        connected(server.url, concurrency=5000)


@pytest.mark.parametrize("value", ["", "soon", "nan", "inf", "-5", "1e999", "Mon, 99 Foo 2026"])
def test_a_pause_that_is_none(value: str) -> None:
    assert retry_after(value) in (None, 0.0)


def test_a_longer_pause_than_the_user_allows(server: StubServer) -> None:
    """Not slept through: a job is told at once, and this prompt only, as others are answered."""
    with pytest.raises(RecordError, match=r"server error: 429 .*for \d+ s \(--retry-for\)"):
        asyncio.run(ask(server, "LATER-429-SECONDS", retry_for_s=0.5))


@pytest.mark.parametrize(
    ("word", "times", "message"),
    [
        ("REFUSE", 1, "refused: 400 Bad Request: this is refused"),
        ("FORBIDDEN", 1, "refused: 403 Forbidden: not for you"),
        ("QUOTA", 1, "refused: 429 Too Many Requests: no credit"),
        ("ALWAYS-500", 5, "server error: 5 times 500 Internal Server Error: inside"),
        ("ALWAYS-429", None, r"server error: 429 Too Many Requests: busy, for \d+ s \(--retry-for\)"),
        *((word, 5, "bad answer: 5 times ") for word in ODD_ANSWERS),
    ],
)
@pytest.mark.parametrize("chat", [False, True])
def test_gives_up_on_one_prompt(server: StubServer, word: str, times: int | None, message: str, chat: bool) -> None:
    text = f"{word} "
    with pytest.raises(RecordError, match=f"^{message}"):
        asyncio.run(ask(server, text, chat=chat, retry_for_s=0.2))
    assert server.requests[text] == times or times is None


@pytest.mark.parametrize("status", [401, 403, 404, 429, 500])
def test_what_concerns_all_prompts(server: StubServer, status: int) -> None:
    """One line, with the address and what came, but without the key that the server repeats."""
    server.refuses = status
    options = {"api_key": "sk-very-secret", "retry_for_s": 0.2}
    with pytest.raises(
        JobStoppedError, match=rf"{server.url} answers nothing any more: .*{status} \w+.*: no, "
    ) as said:
        asyncio.run(ask(server, "x", **options))
    assert "secret" not in str(said.value)
    assert "\n" not in str(said.value)


def test_the_limit_is_for_the_whole_answer(server: StubServer) -> None:
    for word in ("ENDLESS-DRIP", "ENDLESS-DRIP"):
        with pytest.raises(RecordError, match=r"timeout: no whole answer in 1 s \(--timeout\)"):
            asyncio.run(ask(server, word, timeout_s=1.0))
    server.delay_s = 2.0
    with pytest.raises(JobStoppedError, match=r"answers nothing any more: no whole answer in 0\.2 s"):
        asyncio.run(ask(server, "slow", timeout_s=0.2))


def test_answers_without_an_end(server: StubServer) -> None:
    with pytest.raises(RecordError, match=r"bad answer: more than 1,048,896 bytes"):
        asyncio.run(ask(server, "ENDLESS-ANSWER"))
    with pytest.raises(RecordError, match=r"refused: 400 Bad Request: x") as said:
        asyncio.run(ask(server, "ENDLESS-ERROR"))
    assert len(str(said.value)) < 1000


def test_gives_up_on_the_server(server: StubServer) -> None:
    with pytest.raises(JobStoppedError, match="has no model 'other', but stub; see --model"):
        connected(server.url, model="other")
    url = server.url
    server.stop()
    with pytest.raises(JobStoppedError, match=rf"^{url} gives no list of models: .* for \d+ s \(--retry-for\)"):
        connected(url, retry_for_s=0.3)


@pytest.mark.parametrize(
    "said", [b"<html>", b"[]", b"{}", b"[null]", b'{"data": null}', b"null", b"\xff", b"[" * 10**5]
)
def test_no_list_of_models(server: StubServer, said: bytes) -> None:
    server.models = said
    with pytest.raises(JobStoppedError, match=rf"^{server.url} gives no list of models: 5 times no ") as error:
        connected(server.url)
    assert "\n" not in str(error.value)


def test_odd_lists_of_models(server: StubServer) -> None:
    server.models = b'{"data": [null, {"id": 5}, {"id": "[/red]", "root": 5, "max_model_len": "77"}]}'
    model, backend = connected(server.url)
    assert (model, backend.max_model_len) == (ServedModel(id="[/red]"), None)
    with pytest.raises(JobStoppedError, match=r"has no model 'x', but \[/red\]; see --model"):
        connected(server.url, model="x")
    server.models = b'{"data": []}'
    with pytest.raises(JobStoppedError, match="serves no model"):
        connected(server.url)
    assert connected(server.url, model="x")[0].id == "x"


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://x/v1", "", "http://", "http://[::1/v1", "http://user:secret@/v1"]
)
def test_no_address(url: str) -> None:
    with pytest.raises(ValueError, match="--base-url must be an address such as http://localhost:8000/v1") as error:
        connected(url)
    assert "secret" not in str(error.value)


def test_an_address_without_v1_and_with_a_password(server: StubServer) -> None:
    url = f"http://user:s%40cret@127.0.0.1:{server.port}"
    with pytest.raises(
        JobStoppedError, match=r"^http://127\.0\.0\.1:\d+/? gives no list .* ends with /v1\): 404"
    ) as error:
        connected(url)
    assert "cret" not in str(error.value)
    connected(f"{url}/v1")
    connected(server.url, api_key="k")
    assert server.authorization == {"Basic dXNlcjpzQGNyZXQ=", "Bearer k"}


def test_what_the_server_says_of_its_model() -> None:
    with StubServer(root="folder", max_model_len=77) as server:
        model, backend = connected(server.url, concurrency=7)
    assert (model, backend.concurrency) == (ServedModel(id=MODEL, root="folder", max_model_len=77), 7)


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
