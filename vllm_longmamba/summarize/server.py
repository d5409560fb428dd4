"""An OpenAI-compatible server as the backend: what it says is checked once, here; retries, and patience."""

import asyncio
import base64
import email.utils
import json
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import tenacity
from yarl import URL

from vllm_longmamba.summarize.prompts import Prompt
from vllm_longmamba.summarize.records import Completion, JobStoppedError, RecordError, printable
from vllm_longmamba.summarize.settings import JobSettings

Result = TypeVar("Result")

_CONCURRENCY = 64
_CONNECT_TIMEOUT_S = 10.0
_PAUSE = tenacity.wait_random_exponential(multiplier=0.5, max=30.0)
_sleep = asyncio.sleep
# A server that is up but fails on a request: that request may be the reason.
_MAX_FAILURES = 5
_AWAY = (408, 409, 429, 502, 503, 504)
_REFUSED = (401, 402, 403, 404)
_MAX_ERROR_BYTES = 64 * 1024
# Of an answer: so much, and more for each token that was asked for.
_BASE_BYTES, _BYTES_A_TOKEN = 2**20, 64
_MAX_TOKENS = 2**48
# Who answers this, answers.
_PROBE = Prompt("Hello", "Hello", None)


class _NoAnswerError(Exception):
    """A request without an answer, since a time; other requests may have none either."""

    def __init__(self, kind: str, detail: str, since: float | None = None) -> None:
        super().__init__(detail)
        self.kind, self.since = kind, since


class _AgainError(_NoAnswerError):
    """Another try may help: after `pause` seconds if the server says so; `away`: it is not the request that failed."""

    def __init__(self, kind: str, detail: str, *, away: bool = False, pause: float | None = None) -> None:
        super().__init__(kind, detail)
        self.away, self.pause = away, pause


@dataclass(frozen=True)
class ServedModel:
    """What a server says of a model: its name there, its folder or name elsewhere, and its length."""

    name: str
    root: str
    max_model_len: int | None


class ServerBackend:
    """A server somewhere; `connect` must come first.

    Args:
        settings: of the job.

    Raises:
        ValueError: its address is none.
    """

    def __init__(self, settings: JobSettings) -> None:
        try:
            url = URL(str(settings.base_url))
            if url.scheme not in ("http", "https") or not url.host:
                raise ValueError
        except ValueError:
            raise ValueError("--base-url must be an address such as http://localhost:8000/v1") from None
        self.tokenizer: Any = None
        self.max_model_len: int | None = None
        self.concurrency = settings.concurrency or _CONCURRENCY
        self.chat = False
        # As it is shown: without a password.
        self._address = str(url.with_user(None).with_query(None).with_fragment(None))
        self._url, self._settings, self._model = url.with_user(None), settings, settings.model
        self._secrets = [secret for secret in (settings.api_key, url.password) if secret]
        self._last_answer = -math.inf
        authorization = f"Bearer {settings.api_key or 'none'}"
        if url.user:
            name = f"{url.user}:{url.password or ''}".encode()
            authorization = f"Basic {base64.b64encode(name).decode()}"
        self._session = aiohttp.ClientSession(
            headers={
                "Authorization": authorization,
                "Accept-Encoding": "identity",
                "Content-Type": "application/json",
            },
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(settings.timeout_s, sock_connect=_CONNECT_TIMEOUT_S),
            trust_env=True,
        )

    async def connect(self) -> ServedModel:
        """Find the model.

        Raises:
            JobStoppedError: the server does not answer, or not with a list that has the model.
        """
        wanted = self._settings.model
        try:
            models = await self._patiently(lambda: self._ask("GET", "models", None, _models))
        except _NoAnswerError as error:
            hint = "" if self._address.rstrip("/").endswith("/v1") else " (the address of an API mostly ends with /v1)"
            raise JobStoppedError(f"{self._address} gives no list of models{hint}: {error}") from None
        found = next((model for model in models if wanted in (None, model.name)), None)
        if found is None and models:
            names = ", ".join(printable(model.name, 100) for model in models[:20])
            raise JobStoppedError(f"{self._address} has no model {wanted!r}, but {names}; see --model")
        if found is None and wanted is None:
            raise JobStoppedError(f"{self._address} serves no model")
        found = found or ServedModel(str(wanted), str(wanted), None)
        self._model, self.max_model_len = found.name, found.max_model_len
        return found

    async def complete(self, prompt: Prompt) -> Completion:
        """Answer one prompt; see `Backend`."""
        started = time.monotonic()
        try:
            completion = await self._patiently(lambda: self._request(prompt, self._settings.sampling.max_tokens))
        except _NoAnswerError as error:
            if await self._answers_others(error.since or started):
                raise RecordError(error.kind, str(error)) from None
            raise JobStoppedError(f"{self._address} answers nothing any more: {error}") from None
        self._last_answer = time.monotonic()
        return completion

    async def close(self) -> None:
        """Close the connections."""
        await self._session.close()

    async def _answers_others(self, since: float) -> bool:
        """Whether the server has answered another prompt since, or answers a short one now."""
        if self._last_answer > since:
            return True
        try:
            await self._request(_PROBE, 1)
        except (RecordError, _NoAnswerError):
            return False
        return True

    async def _request(self, prompt: Prompt, max_tokens: int) -> Completion:
        body = {"model": self._model, **self._settings.sampling.parameters(), "max_tokens": max_tokens}
        body |= {"messages": [{"role": "user", "content": prompt.content}]} if self.chat else {"prompt": prompt.text}
        path = "chat/completions" if self.chat else "completions"
        tokens = len(prompt.token_ids or [])
        limit = _BASE_BYTES + _BYTES_A_TOKEN * max_tokens
        return await self._ask("POST", path, body, lambda said: _completion(said, self.chat, tokens), limit)

    async def _ask(
        self, method: str, path: str, body: Any, read: Callable[[Any], Result], limit: int = _BASE_BYTES
    ) -> Result:
        """One request, and what `read` makes of the JSON that comes back."""
        data = None if body is None else json.dumps(body).encode()
        try:
            async with self._session.request(method, self._url / path, data=data) as response:
                if response.status >= 400:
                    raise self._failure(response, await _read(response, _MAX_ERROR_BYTES))
                said = await _read(response, limit + 1)
        except TimeoutError as error:
            if isinstance(error, aiohttp.ConnectionTimeoutError):
                raise _AgainError("server error", self._clean(str(error)), away=True) from None
            detail = f"no whole answer in {self._settings.timeout_s:g} s (--timeout)"
            raise _NoAnswerError("timeout", detail) from None
        except (aiohttp.ClientError, OSError) as error:
            raise _AgainError("server error", self._clean(str(error) or type(error).__name__), away=True) from None
        if len(said) > limit:
            raise _NoAnswerError("bad answer", f"more than {limit:,} bytes")
        try:
            return read(json.loads(said))
        except (ValueError, RecursionError) as error:
            detail = str(error) if isinstance(error, _UnexpectedError) else f"no JSON: {said[:200]!r}"
            raise _AgainError("bad answer", self._clean(detail)) from None

    def _failure(self, response: aiohttp.ClientResponse, content: bytes) -> Exception:
        """The error that an answer with another status than 200 means."""
        text = content.decode("utf-8", "replace")
        code: tuple[Any, ...] = ()
        try:
            error = json.loads(text)["error"]
            text, code = str(error["message"]), (error.get("code"), error.get("type"))
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
            pass
        status = response.status
        detail = f"{status} {printable(response.reason or '', 50)}: {self._clean(text)}"
        if status in _REFUSED or "insufficient_quota" in code:
            return _NoAnswerError("refused", detail)
        if status in _AWAY or status >= 500:
            pause = _retry_after(response.headers.get("Retry-After", ""))
            return _AgainError("server error", detail, away=status in _AWAY, pause=pause)
        return RecordError("refused", detail)

    def _clean(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return printable(text)

    async def _patiently(self, request: Callable[[], Awaitable[Result]]) -> Result:
        """Call until it succeeds, or it is enough: of failures, or of the time that the server may be away."""
        since, failures = 0.0, 0

        def pause(state: tenacity.RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            return error.pause if isinstance(error, _AgainError) and error.pause is not None else _PAUSE(state)

        def is_enough(state: tenacity.RetryCallState) -> bool:
            nonlocal since, failures
            error = state.outcome.exception() if state.outcome else None
            since = since or time.monotonic()
            if isinstance(error, _AgainError) and not error.away:
                failures += 1
                return failures >= _MAX_FAILURES
            return time.monotonic() + state.upcoming_sleep - since > self._settings.retry_for_s

        again = tenacity.retry_if_exception_type(_AgainError)
        try:
            async for attempt in tenacity.AsyncRetrying(
                retry=again, wait=pause, stop=is_enough, sleep=_sleep, reraise=True
            ):
                with attempt:
                    return await request()
        except _AgainError as error:
            if not error.away:
                raise _NoAnswerError(error.kind, f"{failures} times {error}") from None
            away = f"for {time.monotonic() - since:.0f} s (--retry-for)"
            raise _NoAnswerError(error.kind, f"{error}, {away}", since) from None
        raise AssertionError("unreachable")


async def _read(response: aiohttp.ClientResponse, limit: int) -> bytes:
    """The first bytes of a body."""
    content = bytearray()
    async for part in response.content.iter_any():
        content += part
        if len(content) >= limit:
            response.close()
            break
    return bytes(content[:limit])


def _retry_after(value: str) -> float | None:
    """Seconds that the header Retry-After asks for, which is a number of seconds or a date."""
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return None
    return max(seconds, 0.0) if math.isfinite(seconds) else None


class _UnexpectedError(ValueError):
    """JSON, but not what it should be."""

    def __init__(self, lacks: str, said: Any) -> None:
        super().__init__(f"{lacks}: {printable(repr(said), 200)}")


def _models(said: Any) -> list[ServedModel]:
    data = said.get("data") if isinstance(said, dict) else None
    if not isinstance(data, list):
        raise _UnexpectedError("no list under 'data'", said)
    models = []
    for each in data:
        if isinstance(each, dict) and isinstance(each.get("id"), str):
            root, length = each.get("root"), each.get("max_model_len")
            known = type(length) is int and 0 < length < _MAX_TOKENS
            root = root if isinstance(root, str) else each["id"]
            models.append(ServedModel(each["id"], root, length if known else None))
    return models


def _completion(said: Any, chat: bool, prompt_tokens: int) -> Completion:
    choices = said.get("choices") if isinstance(said, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if chat and isinstance(choice, dict) else choice
    text = message.get("content" if chat else "text") if isinstance(message, dict) else None
    if not isinstance(choice, dict) or not isinstance(text, str):
        raise _UnexpectedError("no text in its choices", said)
    # A server that is being stopped may answer with what it has so far.
    reason = choice.get("finish_reason")
    if reason not in ("stop", "length", "content_filter", "tool_calls"):
        raise _UnexpectedError("its finish_reason", reason)
    usage = said.get("usage")
    if usage is None:
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": 0}
    names = ("prompt_tokens", "completion_tokens")
    counts: list[Any] = [usage.get(name) for name in names] if isinstance(usage, dict) else [None]
    if not all(type(count) is int and 0 <= count < _MAX_TOKENS for count in counts):
        raise _UnexpectedError("no numbers of tokens", usage)
    return Completion(text.encode("utf-8", "replace").decode(), counts[0], counts[1], reason)


async def connected(settings: JobSettings, say: Callable[[str], None]) -> ServerBackend:
    """A server that has the model, and its tokenizer where that is on this machine.

    Args:
        settings: of the job.
        say: prints a line.

    Raises:
        ValueError: the tokenizer cannot be loaded.
        JobStoppedError: the server does not answer, or has not the model.
    """
    backend = ServerBackend(settings)
    try:
        model = await backend.connect()
        backend.tokenizer = await asyncio.to_thread(_tokenizer, settings.tokenizer, model.root, say)
    except BaseException:
        await backend.close()
        raise
    return backend


def _tokenizer(given: str | None, guess: str, say: Callable[[str], None]) -> Any:
    if given is None and not _is_here(guess):
        say(f"no tokenizer at {printable(guess)!r}: tokens are counted by the server only")
        return None
    # Half a gigabyte of libraries.
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(given or guess, local_files_only=given is None, trust_remote_code=False)
    except Exception as error:
        option = "--tokenizer" if given is not None else "the tokenizer of the served model,"
        raise ValueError(f"{option} {printable(given or guess)}: {error}") from None


def _is_here(name: str) -> bool:
    """Whether a tokenizer is a folder on this machine, or in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    try:
        return (Path(name) / "tokenizer_config.json").is_file() or isinstance(
            try_to_load_from_cache(name, "tokenizer_config.json"), str
        )
    except (ValueError, OSError):
        # Not the form of a path, or of a name on the hub.
        return False
