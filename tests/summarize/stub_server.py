"""An OpenAI-compatible server that answers at once, and misbehaves on request. Runs in a thread, or as a script.

The answer to a prompt is `answer(prompt)`: its first words and its length. Words of the document make it misbehave:
see `_misbehave`.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import sys
import threading
import time
from collections import Counter
from typing import Any

from aiohttp import web

MODEL = "stub"


# What a server may say with code 200, by a word of the document: none of it is an answer.
ODD_ANSWERS = {
    "ODD-HTML": "<html>Welcome</html>",
    "ODD-TORN": '{"choices": [{"te',
    "ODD-LIST": "[]",
    "ODD-NULL": "null",
    "ODD-TEXT": '"choices"',
    "ODD-DEEP": "[" * 100_000,
    "ODD-NO-CHOICES": '{"choices": []}',
    "ODD-NULL-CHOICE": '{"choices": [null]}',
    "ODD-NULL-MESSAGE": '{"choices": [{"message": null, "finish_reason": "stop"}]}',
    "ODD-NUMBER": '{"choices": [{"text": 5, "message": {"content": 5}, "finish_reason": "stop"}]}',
    "ODD-PARTS": '{"choices": [{"text": ["a"], "message": {"content": ["a"]}, "finish_reason": "stop"}]}',
    "ODD-NO-REASON": '{"choices": [{"text": "a", "message": {"content": "a"}, "finish_reason": null}]}',
} | {
    f"ODD-USAGE-{name}": '{"choices": [{"text": "a", "message": {"content": "a"}, "finish_reason": "stop"}], '
    f'"usage": {usage}}}'
    for name, usage in {
        "STRING": '"many"',
        "NAN": '{"prompt_tokens": NaN, "completion_tokens": 1}',
        "HUGE": f'{{"prompt_tokens": {10**30}, "completion_tokens": 1}}',
        "NEGATIVE": '{"prompt_tokens": -1, "completion_tokens": 1}',
        "TRUE": '{"prompt_tokens": true, "completion_tokens": 1}',
    }.items()
}


def answer(prompt: str) -> str:
    """What the server says to a prompt."""
    return f"{' '.join(prompt.split()[:3])} ({len(prompt)} characters)"


class StubServer:
    """A server on a port of 127.0.0.1.

    Args:
        port: 0 takes a free one.
        delay_s: time that every answer takes.
        root: what it says the model's folder is.
        max_model_len: what it says a prompt and its answer may have.

    Attributes:
        requests: how often each prompt came.
        most_at_once: requests that were under way at a time, at most.
        models: what it says under /models, as bytes; None is what a server says.
        refuses: status of every answer; None is none.
    """

    def __init__(
        self, port: int = 0, delay_s: float = 0.0, root: str = MODEL, max_model_len: int | None = None
    ) -> None:
        self.port = port
        self.delay_s = delay_s
        self.requests: Counter[str] = Counter()
        self.most_at_once = 0
        self.models: bytes | None = None
        self.refuses: int | None = None
        self.authorization: set[str | None] = set()
        self._model = {"id": MODEL, "object": "model", "created": 0, "owned_by": "test", "root": root}
        self._model |= {} if max_model_len is None else {"max_model_len": max_model_len}
        self._at_once = 0
        self._loop = asyncio.new_event_loop()
        self._ended = asyncio.Event()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> StubServer:
        self._thread.start()
        assert self._ready.wait(20)
        return self

    def stop(self) -> None:
        """End at once: requests under way are cut off."""
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join(20)

    def __enter__(self) -> StubServer:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _run(self) -> None:
        self._loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        app = web.Application(client_max_size=2**28)
        app.router.add_get("/v1/models", self._list)
        app.router.add_post("/v1/completions", self._complete)
        app.router.add_post("/v1/chat/completions", self._complete)
        runner = web.AppRunner(app, shutdown_timeout=0.0)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        assert site._server is not None
        self.port = site._server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._ended.wait()
        await site.stop()
        assert runner.server is not None
        # Whoever is connected is cut off, also where the connection is so new that its request was not read yet.
        for _ in range(20):
            for connection in runner.server.connections:
                if connection.transport is not None:
                    connection.transport.abort()
            await asyncio.sleep(0.005)
        await runner.cleanup()

    async def _list(self, request: web.Request) -> web.Response:
        self.authorization.add(request.headers.get("Authorization"))
        if self.models is not None:
            return web.Response(body=self.models)
        return web.json_response({"object": "list", "data": [self._model]})

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            body = json.loads(await request.read())
            chat = "messages" in body
            prompt = body["messages"][0]["content"] if chat else body["prompt"]
            self.requests[prompt] += 1
            await asyncio.sleep(self.delay_s)
            if self.refuses is not None:
                return web.json_response({"error": {"message": f"no, {request.headers}"}}, status=self.refuses)
            if endless := next((word for word in ENDLESS if word in prompt), None):
                return await _endless(request, *ENDLESS[endless])
            return _misbehave(prompt, self.requests[prompt]) or web.json_response(_response(prompt, chat))
        finally:
            self._at_once -= 1


# Answers without an end: status, what comes again and again, the pause between.
ENDLESS = {
    "ENDLESS-DRIP": (200, b" ", 0.05),
    "ENDLESS-ANSWER": (200, b" " * 2**20, 0.0),
    "ENDLESS-ERROR": (400, b"x" * 2**20, 0.0),
}


async def _endless(request: web.Request, status: int, part: bytes, pause: float) -> web.StreamResponse:
    response = web.StreamResponse(status=status)
    await response.prepare(request)
    while True:
        await response.write(part)
        await asyncio.sleep(pause)


def _misbehave(prompt: str, times: int) -> web.Response | None:
    if "REFUSE" in prompt:
        return web.json_response({"error": {"message": "this is refused"}}, status=400)
    if "ALWAYS-500" in prompt:
        return web.json_response({"error": {"message": "inside"}}, status=500)
    for word, body in ODD_ANSWERS.items():
        if f"{word} " in prompt:
            return web.Response(text=body)
    if "NOT-TODAY" in prompt and times == 1:
        return web.Response(status=500, headers={"Retry-After": "86400"})
    if "FORBIDDEN" in prompt:
        return web.json_response({"error": {"message": "not for you"}}, status=403)
    if "ALWAYS-429" in prompt:
        return web.json_response({"error": {"message": "busy"}}, status=429)
    if "QUOTA" in prompt:
        return web.json_response({"error": {"message": "no credit", "code": "insufficient_quota"}}, status=429)
    for status in (429, 503):
        for kind, value in (("SECONDS", "1"), ("DATE", email.utils.formatdate(time.time() + 2, usegmt=True))):
            if f"LATER-{status}-{kind}" in prompt and times == 1:
                return web.Response(status=status, headers={"Retry-After": value})
    if "NO-USAGE" in prompt:
        return web.json_response(_response(prompt, False) | {"usage": None})
    if "SURROGATE" in prompt:
        return web.Response(text=json.dumps(_response(prompt, False)).replace("SURROGATE", r"\ud800", 1))
    if "BUSY-TWICE" in prompt and times <= 2:
        return web.json_response({"error": {"message": "busy"}}, status=429)
    if "ABORT-ONCE" in prompt and times == 1:
        return web.json_response(_response(prompt, False, finish_reason="abort"))
    return None


def _response(prompt: str, chat: bool, finish_reason: str = "stop") -> dict[str, Any]:
    text = answer(prompt)
    said = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    usage = {"prompt_tokens": len(prompt), "completion_tokens": len(text), "total_tokens": len(prompt) + len(text)}
    choice = {"index": 0, "finish_reason": finish_reason, "logprobs": None, **said}
    kind = "chat.completion" if chat else "text_completion"
    return {"id": "1", "object": kind, "created": 0, "model": MODEL, "choices": [choice], "usage": usage}


if __name__ == "__main__":
    with StubServer(int(sys.argv[1])) as server:
        print(server.url, flush=True)
        threading.Event().wait()
