"""An OpenAI-compatible server as the backend: concurrency, retries with back-off, and patience while it restarts."""

import asyncio
import random
import time
from dataclasses import dataclass
from typing import Any

from vllm_longmamba.summarize.backends import Sampling
from vllm_longmamba.summarize.prompts import Prompt
from vllm_longmamba.summarize.records import Completion, JobStoppedError, RecordError

_CONNECT_TIMEOUT_S = 10.0
_FIRST_DELAY_S = 0.25
_LONGEST_DELAY_S = 30.0
# A server that is up but fails on a request: that request may be the reason.
_MAX_FAILURES = 5
_FINISHED = ("stop", "length", "content_filter", "tool_calls")


class _AbortedError(Exception):
    """An answer that is not whole."""


@dataclass(frozen=True)
class ServerOptions:
    """How a server is spoken to.

    Attributes:
        base_url: address of its API, up to and with /v1.
        model: name there; None takes the first one that it lists.
        api_key: sent as the bearer token.
        timeout_s: longest time for one answer.
        retry_for_s: how long the server may be away before the job stops.
    """

    base_url: str
    model: str | None = None
    api_key: str = "none"
    timeout_s: float = 3600.0
    retry_for_s: float = 600.0


class ServerBackend:
    """A server somewhere. Use `connect` to make one.

    Args:
        client: of the `openai` package.
        model: name of the model there.
        chat: whether to use /chat/completions instead of /completions.
        max_model_len: what the server says, or None.
        tokenizer: of the model, or None.
        options: how the server is spoken to.
        sampling: how answers are sampled.
        concurrency: requests at a time.
    """

    def __init__(
        self,
        client: Any,
        model: str,
        max_model_len: int | None,
        options: ServerOptions,
        sampling: Sampling,
        concurrency: int,
    ) -> None:
        self.tokenizer: Any = None
        self.max_model_len = max_model_len
        self.concurrency = concurrency
        self.chat = False
        self.model = model
        self._client = client
        self._options = options
        self._sampling = sampling

    async def complete(self, prompt: Prompt) -> Completion:
        """Answer one prompt; see `Backend`."""
        response = await _patiently(lambda: self._request(prompt), self._options)
        choice = response.choices[0]
        text = choice.message.content if self.chat else choice.text
        prompt_tokens, output_tokens = len(prompt.token_ids or []), 0
        if response.usage is not None:
            prompt_tokens, output_tokens = response.usage.prompt_tokens, response.usage.completion_tokens
        return Completion(text or "", prompt_tokens, output_tokens, choice.finish_reason)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def _request(self, prompt: Prompt) -> Any:
        common: dict[str, Any] = {
            "model": self.model,
            "max_tokens": self._sampling.max_tokens,
            "temperature": self._sampling.temperature,
            "top_p": self._sampling.top_p,
        }
        if self._sampling.temperature > 0:
            common["seed"] = self._sampling.seed
        if self._sampling.stop:
            common["stop"] = list(self._sampling.stop)
        if self.chat:
            messages: Any = [{"role": "user", "content": prompt.content}]
            response: Any = await self._client.chat.completions.create(messages=messages, **common)
        else:
            response = await self._client.completions.create(prompt=prompt.text, **common)
        reason = response.choices[0].finish_reason if response.choices else "no choices"
        if reason not in _FINISHED:
            # A server that is being stopped may answer with what it has so far.
            raise _AbortedError(f"the server ended an answer with {reason!r}")
        return response


async def connect(options: ServerOptions, sampling: Sampling, concurrency: int) -> tuple[ServerBackend, str]:
    """Find a server and its model.

    Returns:
        The backend, and where its tokenizer may be found: the folder or name that the server gives as the model's root.

    Raises:
        JobStoppedError: it does not answer, or not with a list of models.
    """
    import openai

    client = openai.AsyncOpenAI(
        base_url=options.base_url,
        api_key=options.api_key,
        max_retries=0,
        timeout=openai.Timeout(options.timeout_s, connect=_CONNECT_TIMEOUT_S),
    )

    async def list_models() -> Any:
        return await client.models.list()

    try:
        models = (await _patiently(list_models, options)).data
    except (RecordError, JobStoppedError) as error:
        await client.close()
        raise JobStoppedError(f"{options.base_url} gives no list of models: {error}") from None
    names = [model.id for model in models]
    chosen = next((model for model in models if options.model in (None, model.id)), None)
    if chosen is None and options.model is None:
        await client.close()
        raise JobStoppedError(f"{options.base_url} serves no model")
    if chosen is None and names:
        await client.close()
        raise JobStoppedError(f"{options.base_url} has no model {options.model!r}, but {', '.join(names)}; see --model")
    name = chosen.id if chosen is not None else str(options.model)
    extra = (chosen.model_extra or {}) if chosen is not None else {}
    backend = ServerBackend(client, name, extra.get("max_model_len"), options, sampling, concurrency)
    return backend, str(extra.get("root") or name)


async def _patiently(request: Any, options: ServerOptions) -> Any:
    """Call until it succeeds: back-off with jitter while the server is away or overloaded."""
    import openai

    delay = _FIRST_DELAY_S
    failures = 0
    away_since: float | None = None
    while True:
        try:
            return await request()
        except _AbortedError as error:
            away_since = _check_away(away_since, options, error)
        except openai.APITimeoutError as error:
            if type(error.__cause__).__name__ == "ConnectTimeout":
                away_since = _check_away(away_since, options, error)
            else:
                failures += 1
            if failures >= _MAX_FAILURES:
                raise RecordError("timeout", f"{failures} times no answer in {options.timeout_s:g} s") from None
        except openai.APIConnectionError as error:
            away_since = _check_away(away_since, options, error.__cause__ or error)
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            raise JobStoppedError(f"{options.base_url} refuses: {error}") from None
        except openai.APIStatusError as error:
            status = error.status_code
            if status in (408, 409, 429, 502, 503, 504):
                away_since = _check_away(away_since, options, error)
            elif status >= 500:
                failures += 1
                if failures >= _MAX_FAILURES:
                    raise RecordError("server error", f"{failures} times {error}") from None
            else:
                raise RecordError("refused", str(error)) from None
        except openai.APIError as error:
            failures += 1
            if failures >= _MAX_FAILURES:
                raise RecordError("server error", f"{failures} times {error}") from None
        await asyncio.sleep(delay * random.uniform(0.5, 1.0))
        delay = min(2 * delay, _LONGEST_DELAY_S)


def _check_away(since: float | None, options: ServerOptions, error: BaseException) -> float:
    now = time.monotonic()
    if since is not None and now - since > options.retry_for_s:
        raise JobStoppedError(f"{options.base_url} is away since {now - since:.0f} s (--retry-for): {error}")
    return now if since is None else since
