"""An OpenAI-compatible server as the backend: retries, and patience."""

import asyncio
import json
import math
import resource
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import tenacity
from pydantic import BaseModel, ValidationError
from rich.console import Console
from yarl import URL

from vllm_longmamba.summarize.progress import say
from vllm_longmamba.summarize.prompts import Prompt
from vllm_longmamba.summarize.records import Completion, JobStoppedError, RecordError
from vllm_longmamba.summarize.served import Answer, Models, ServedModel, Usage, printable, retry_after
from vllm_longmamba.summarize.settings import JobSettings

_CONCURRENCY = 64
# Open beside the connections.
_OTHER_FILES = 256
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

Said = TypeVar("Said", bound=BaseModel)


@dataclass
class _NoAnswerError(Exception):
    """A request without an answer.

    Attributes:
        kind, detail: as of `RecordError`.
        away: whether the server failed, and not the request.
        again: whether another try may help.
        pause: seconds that the server asks for until the next try.
        since: when the first of several tries failed.
    """

    kind: str
    detail: str
    away: bool = False
    again: bool = False
    pause: float | None = None
    since: float | None = None

    def __str__(self) -> str:
        return self.detail


class ServerBackend:
    """A server somewhere; `connect` must come first.

    Raises:
        ValueError: its address is none, or there may not be as many connections.
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
        _allow_files(self.concurrency + _OTHER_FILES)
        # As it is shown: without a password.
        self._address = str(url.with_user(None).with_query(None).with_fragment(None))
        self._url, self._settings, self._model = url, settings, settings.model
        self._secrets = [secret for secret in (settings.api_key, url.password, url.raw_password) if secret]
        self._last_answer = -math.inf
        # The name and password in an address become a header of their own.
        authorization = {} if url.user else {"Authorization": f"Bearer {settings.api_key or 'none'}"}
        self._session = aiohttp.ClientSession(
            headers=authorization | {"Accept-Encoding": "identity"},
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(settings.timeout_s, sock_connect=_CONNECT_TIMEOUT_S),
            trust_env=True,
        )

    async def connect(self, console: Console) -> ServedModel:
        """Find the model, and its tokenizer where that is on this machine.

        Raises:
            JobStoppedError: the server does not answer, or not with a list that has the model.
            ValueError: the tokenizer cannot be loaded.
        """
        wanted = self._settings.model
        try:
            said = await self._patiently(self._ask, "GET", "models", None, Models)
        except _NoAnswerError as error:
            hint = "" if self._address.rstrip("/").endswith("/v1") else " (the address of an API mostly ends with /v1)"
            raise JobStoppedError(f"{self._address} gives no list of models{hint}: {error}") from None
        models = [model for model in said.data if model is not None]
        if not models and wanted is None:
            raise JobStoppedError(f"{self._address} serves no model")
        found = next((model for model in models if wanted in (None, model.id)), ServedModel(id=str(wanted)))
        if models and found not in models:
            names = ", ".join(printable(model.id, 100) for model in models[:20])
            raise JobStoppedError(f"{self._address} has no model {wanted!r}, but {names}; see --model")
        self._model, self.max_model_len = found.id, found.max_model_len
        root = found.root or found.id
        self.tokenizer = await asyncio.to_thread(_tokenizer, self._settings.tokenizer, root)
        if self.tokenizer is None:
            say(console, f"no tokenizer at {printable(root)!r}: tokens are counted by the server only")
        return found

    async def complete(self, prompt: Prompt) -> Completion:
        """Answer one prompt; see `Backend`."""
        started = time.monotonic()
        try:
            answer = await self._patiently(self._request, prompt, self._settings.sampling.max_tokens)
        except _NoAnswerError as error:
            if self._last_answer > (error.since or started) or await self._answers(prompt.chat):
                raise RecordError(error.kind, str(error)) from None
            raise JobStoppedError(f"{self._address} answers nothing any more: {error}") from None
        self._last_answer = time.monotonic()
        usage = answer.usage or Usage(prompt_tokens=prompt.tokens, completion_tokens=0)
        choice = answer.choices[0]
        return Completion(choice.text, usage.prompt_tokens, usage.completion_tokens, choice.finish_reason)

    async def close(self) -> None:
        """Close the connections."""
        await self._session.close()

    async def _answers(self, chat: bool) -> bool:
        """Whether the server answers a short prompt now."""
        try:
            await self._request(Prompt("Hello", "Hello", None, chat), 1)
        except (RecordError, _NoAnswerError):
            return False
        return True

    async def _request(self, prompt: Prompt, max_tokens: int) -> Answer:
        body = {"model": self._model, **self._settings.sampling.parameters(), "max_tokens": max_tokens}
        body |= {"messages": [{"role": "user", "content": prompt.content}]} if prompt.chat else {"prompt": prompt.text}
        path = "chat/completions" if prompt.chat else "completions"
        return await self._ask("POST", path, body, Answer, _BASE_BYTES + _BYTES_A_TOKEN * max_tokens)

    async def _ask(self, method: str, path: str, body: Any, kind: type[Said], limit: int = _BASE_BYTES) -> Said:
        """One request, and what comes back."""
        try:
            async with self._session.request(method, self._url / path, json=body) as response:
                if response.status >= 400:
                    raise self._failure(response, await _read(response, _MAX_ERROR_BYTES))
                said = await _read(response, limit + 1)
        except (aiohttp.ClientError, OSError) as error:
            if isinstance(error, TimeoutError) and not isinstance(error, aiohttp.ConnectionTimeoutError):
                detail = f"no whole answer in {self._settings.timeout_s:g} s (--timeout)"
                raise _NoAnswerError("timeout", detail) from None
            raise _NoAnswerError("server error", self._clean(str(error) or type(error).__name__), True, True) from None
        if len(said) > limit:
            raise _NoAnswerError("bad answer", f"more than {limit:,} bytes")
        try:
            return kind.model_validate(json.loads(said))
        except (ValueError, RecursionError) as error:
            why = "no JSON"
            if isinstance(error, ValidationError):
                first = error.errors()[0]
                why = f"no valid {'.'.join(map(str, first['loc'])) or 'answer'} ({first['msg']})"
            raise _NoAnswerError("bad answer", self._clean(f"{why}: {said[:200]!r}"), again=True) from None

    def _failure(self, response: aiohttp.ClientResponse, content: bytes) -> Exception:
        """The error that an answer with another status than 200 means."""
        text, status = content.decode("utf-8", "replace"), response.status
        code: tuple[Any, ...] = ()
        with suppress(ValueError, RecursionError, KeyError, TypeError, AttributeError):
            error = json.loads(text)["error"]
            text, code = str(error["message"]), (error.get("code"), error.get("type"))
        detail = f"{status} {printable(response.reason or '', 50)}: {self._clean(text)}"
        if status in _REFUSED or "insufficient_quota" in code:
            return _NoAnswerError("refused", detail)
        if status not in _AWAY and status < 500:
            return RecordError("refused", detail)
        pause = retry_after(response.headers.get("Retry-After", ""))
        return _NoAnswerError("server error", detail, status in _AWAY, again=True, pause=pause)

    def _clean(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return printable(text)

    async def _patiently(self, request: Callable[..., Awaitable[Said]], *given: Any) -> Said:
        """Call until it succeeds, or it is enough: of failures, or of the time that the server may be away."""
        since, failures = 0.0, 0

        def pause(state: tenacity.RetryCallState) -> float:
            error = _error_of(state)
            if error.pause is None:
                return _PAUSE(state)
            # Where failures are counted, and not the time, no pause may be longer than the server may be away.
            return float(error.pause if error.away else min(error.pause, self._settings.retry_for_s))

        def is_enough(state: tenacity.RetryCallState) -> bool:
            nonlocal since, failures
            since = since or time.monotonic()
            if _error_of(state).away:
                return time.monotonic() + state.upcoming_sleep - since > self._settings.retry_for_s
            failures += 1
            return failures >= _MAX_FAILURES

        again = tenacity.retry_if_exception(lambda error: isinstance(error, _NoAnswerError) and error.again)
        patient = tenacity.AsyncRetrying(retry=again, wait=pause, stop=is_enough, sleep=_sleep, reraise=True)
        try:
            return await patient(request, *given)
        except _NoAnswerError as error:
            if error.away:
                error.detail += f", for {time.monotonic() - since:.0f} s (--retry-for)"
                error.since = since
            elif error.again:
                error.detail = f"{failures} times {error}"
            raise


def _error_of(state: tenacity.RetryCallState) -> Any:
    return state.outcome and state.outcome.exception()


def _allow_files(wanted: int) -> None:
    """Raise the limit of open files: beyond it, connections take those that the documents are read from."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise ValueError(f"{wanted} files must be open at a time, and {hard} may be (ulimit -Hn); lower --concurrency")
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


async def _read(response: aiohttp.ClientResponse, limit: int) -> bytes:
    """The first bytes of a body."""
    try:
        return await response.content.readexactly(limit)
    except asyncio.IncompleteReadError as whole:
        return whole.partial


def _tokenizer(given: str | None, served: str) -> Any:
    """The tokenizer that was asked for, or that of the served model; None if it is not on this machine."""
    from huggingface_hub import try_to_load_from_cache

    is_here = (Path(served) / "tokenizer_config.json").is_file()
    # A ValueError: not the form of a name on the hub.
    with suppress(ValueError, OSError):
        is_here = is_here or isinstance(try_to_load_from_cache(served, "tokenizer_config.json"), str)
    if given is None and not is_here:
        return None
    # Half a gigabyte of libraries.
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(given or served, local_files_only=given is None)
    except Exception as error:
        raise ValueError(f"the tokenizer {printable(given or served)} (--tokenizer): {error}") from None
