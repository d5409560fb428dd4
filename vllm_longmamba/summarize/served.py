"""What servers say, checked once, here; and their words as they may be shown."""

import email.utils
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, AliasPath, BaseModel, BeforeValidator, Field, ValidationError, WrapValidator


def _or_none(said: Any, validate: Callable[[Any], Any]) -> Any:
    try:
        return validate(said)
    except ValidationError:
        return None


def _writable(said: Any) -> Any:
    return said.encode("utf-8", "replace").decode() if isinstance(said, str) else said


# Numbers that fit a column, and text without half surrogate pairs, which cannot be written.
_Count = Annotated[int, Field(ge=0, lt=2**48)]
_Text = Annotated[str, BeforeValidator(_writable)]


class ServedModel(BaseModel, strict=True):
    """What a server says of a model: its name there, its folder or name elsewhere, and its length."""

    id: str
    root: Annotated[str | None, WrapValidator(_or_none)] = None
    max_model_len: Annotated[_Count | None, WrapValidator(_or_none)] = None


class Models(BaseModel, strict=True):
    """Its list of models; what is none is None."""

    data: list[Annotated[ServedModel | None, WrapValidator(_or_none)]]


class Choice(BaseModel, strict=True):
    """A text, of completions or of a chat."""

    text: _Text = Field(validation_alias=AliasChoices("text", AliasPath("message", "content")))
    # A server that is being stopped may answer with what it has so far, for another reason.
    finish_reason: Literal["stop", "length", "content_filter", "tool_calls"]


class Usage(BaseModel, strict=True):
    """Numbers of tokens."""

    prompt_tokens: _Count
    completion_tokens: _Count


class Answer(BaseModel, strict=True):
    """What it says to a prompt."""

    choices: Annotated[list[Choice], Field(min_length=1)]
    usage: Usage | None = None


def retry_after(value: str) -> float | None:
    """Seconds that the header Retry-After asks for, which is a number of seconds or a date."""
    with suppress(ValueError, TypeError, OverflowError):
        if value.isdecimal():
            return float(value)
        return max(email.utils.parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    return None


def printable(text: str, length: int = 500) -> str:
    """Words of others in a message of ours: one line, of limited length, without control characters."""
    shown = "".join(letter if letter.isprintable() else " " for letter in text[: 2 * length])
    shown = " ".join(shown.split())
    return shown if len(shown) <= length else shown[:length] + "..."
